package works;
use Mojo::Base 'basetest', -signatures;
use testapi;
# The guest runs, and finds its memory as it should be: BEAT number uptime verified bad.
sub run ($self) { wait_serial(qr/BEAT \d+ \d+ \d+ 0\D/, 60) or die 'the guest does not run' }
sub test_flags ($self) { return {fatal => 0} }
1;
