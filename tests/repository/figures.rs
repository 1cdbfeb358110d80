//! How fast it is. `cargo test --release --test repository -- --ignored --nocapture figures`

#[test]
#[ignore = "prints measurements"]
fn a_thousand_snapshots_are_listed_forgotten_and_pruned() {}
