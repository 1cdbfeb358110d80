//! Images of all releases: each opens, is whole, and gives its memory, with its parents.

use std::path::{Path, PathBuf};

use snapback::{Image, VerifyOptions, inspect, verify};

/// The releases, by the images that their own programs have saved: of a guest without a system, and
/// of the same guest on top of that.
const RELEASES: [&str; 1] = ["0.2.0"];

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

#[test]
fn images_of_all_releases_open_and_are_whole() {
    for release in RELEASES {
        for (name, parents) in [(release.to_owned(), 0), (format!("{release}-child"), 1)] {
            let path = data(&format!("{name}.snap"));
            let overview = inspect(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            let manifest = overview.manifest;
            assert_eq!(manifest.created_by, format!("snapback {release}"), "{name}");
            assert_eq!(manifest.layers.len(), parents, "{name}");
            assert!(manifest.blocks.iter().any(|block| block.name == "pc.ram"), "{name}");

            let mut options = VerifyOptions::new(&path);
            options.chain = true;
            let report = verify(&options, |_, _| {}).unwrap();
            assert!(report.is_whole() && report.pages > 0, "{name}: {report:?}");
            assert!(Image::open(&path).is_ok(), "{name}");
        }
    }
}
