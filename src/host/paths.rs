//! Where files lie.

use std::path::Path;

/// The directory in which a file of this path lies: of a bare name, the working directory.
pub fn parent_directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_has_a_directory() {
        for (path, directory) in [("/a/b", "/a"), ("a/b", "a"), ("b", "."), ("", "."), ("/", ".")] {
            assert_eq!(parent_directory(Path::new(path)), Path::new(directory), "{path}");
        }
    }
}
