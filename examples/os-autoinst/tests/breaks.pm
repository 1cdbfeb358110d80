package breaks;
use Mojo::Base 'basetest', -signatures;
use testapi;
# What it leaves is to be gone for the next test.
sub run ($self) { sleep 2; die 'it was meant to' }
sub test_flags ($self) { return {fatal => 0} }
1;
