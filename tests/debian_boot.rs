//! The Debian guest itself: it boots on every QEMU, its database works under load
//! and answers, and what the tests are told of it is so.

mod support;

use support::{Guest, Qemu, Result, SOON, debian, wait_until};

fn works(qemu: Qemu) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("snapback-debian-").tempdir()?;
    let disk = debian::make_disk(&folder.path().join("disk.qcow2"))?;
    let mut guest = Guest::boot(&debian::options(qemu, disk))?;

    // It is what it should be.
    assert_eq!(debian::run(&mut guest.oracle, "printf 'a b\\nc\\n'")?, "a b\nc");
    let failure = debian::run(&mut guest.oracle, "echo no; exit 3").unwrap_err().to_string();
    assert!(failure.contains("3 no"), "{failure}");
    assert_eq!(debian::sql(&mut guest.oracle, "SHOW fsync")?, "on");
    assert_eq!(debian::sql(&mut guest.oracle, "SELECT count(*) FROM pgbench_branches")?, "10");

    // It works, and what has been acknowledged is there.
    debian::start_pgbench(&mut guest.oracle, 2)?;
    debian::start_journal(&mut guest.oracle)?;
    let before = debian::transactions(&mut guest.oracle)?;
    wait_until(SOON, "the journal to grow", || debian::acknowledged(&guest).len() > 20)?;
    wait_until(SOON, "pgbench to commit", || {
        debian::transactions(&mut guest.oracle).is_ok_and(|now| now > before)
    })?;
    let told = debian::acknowledged(&guest);
    assert_eq!(told, (1..=told.len() as u64).collect::<Vec<_>>());
    assert!(debian::committed(&mut guest.oracle)? >= told.len() as u64);
    Ok(())
}

#[test]
fn works_on_qemu_7() -> Result<()> {
    works(Qemu::V7)
}

#[test]
fn works_on_qemu_10() -> Result<()> {
    works(Qemu::V10)
}
