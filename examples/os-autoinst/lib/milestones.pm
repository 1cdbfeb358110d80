# Milestones and rollbacks by snapback in the place of os-autoinst's own. QEMU gets a second control
# socket for it by QEMU_APPEND; SNAPBACK names the program where it is not in the path.
package milestones;
use Mojo::Base -strict, -signatures;
use bmwqemu 'diag';
use osutils 'runcmd';
use backend::qemu;
no warnings 'redefine';

my @snapback = $ENV{SNAPBACK} // 'snapback';
my @guest    = ('--qmp', 'snapback.sock');

*backend::qemu::save_snapshot = sub ($self, $args) {
    $self->save_console_snapshots($args->{name});
    runcmd(@snapback, 'save', @guest, "$args->{name}.snap", '--force', '--resettable', '--detach');
};

*backend::qemu::load_snapshot = sub ($self, $args) {
    diag 'Loading snapshot';
    runcmd(@snapback, 'reset', '--in-place', @guest);
    $self->load_console_snapshots($args->{name});
    diag 'Restored snapshot';
};

1;
