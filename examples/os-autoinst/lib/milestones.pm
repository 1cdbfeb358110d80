# Milestones and rollbacks by snapback in the place of os-autoinst's own. QEMU gets a second control
# socket for it by QEMU_APPEND; SNAPBACK names the program where it is not in the path.
package milestones;
use Mojo::Base -strict, -signatures;
use bmwqemu 'diag';
use backend::qemu;
no warnings 'redefine';

*backend::qemu::save_snapshot = sub ($self, $args) {
    $self->save_console_snapshots($args->{name});
    snapback('save', "$args->{name}.snap", '--force', '--resettable', '--detach');
    diag 'Snapshot complete';
};

*backend::qemu::load_snapshot = sub ($self, $args) {
    diag 'Loading snapshot';
    snapback('reset', '--in-place');
    $self->load_console_snapshots($args->{name});
    diag 'Restored snapshot';
};

sub snapback (@args) {
    # os-autoinst waits for all children itself.
    local $SIG{CHLD} = 'DEFAULT';
    my $program = $ENV{SNAPBACK} // 'snapback';
    system($program, @args, '--json', '--qmp', 'snapback.sock') == 0 or die "snapback @args failed";
}

1;
