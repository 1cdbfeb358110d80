package boot;
use Mojo::Base 'basetest', -signatures;
use testapi;
sub run ($self) { wait_serial(qr/ORACLE READY/, 120) or die 'the guest does not come up' }
sub test_flags ($self) { return {milestone => 1, fatal => 1} }
1;
