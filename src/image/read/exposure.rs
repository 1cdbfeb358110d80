//! Images that others than their owner can read.

use std::fs::{self, Metadata};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::image::Image;

/// The bits of a mode by which its group and everybody may read a file.
const READ_BY_OTHERS: u32 = 0o044;

/// What there is to say of a file that others can read: it holds what was in a guest's memory.
fn warning(path: &Path, file: &Metadata) -> Option<String> {
    let who = match file.permissions().mode() & READ_BY_OTHERS {
        0 => return None,
        0o040 => "its group",
        _ => "everybody",
    };
    let path = path.display();
    Some(format!(
        "{who} may read `{path}`, which holds a guest's memory with all keys and passwords in it: \
         `chmod 600 {}`",
        shlex::try_quote(&path.to_string()).unwrap_or_else(|_| path.to_string().into())
    ))
}

impl Image {
    /// A warning for each of the image's files that its group or everybody may read, with the
    /// command that changes it.
    pub fn exposures(&self) -> Vec<String> {
        let files = self.files();
        files.filter_map(|(path, file)| warning(path, &file.metadata().ok()?)).collect()
    }
}

/// The same of the file of an image alone.
pub fn exposure(path: impl AsRef<Path>) -> Option<String> {
    let path = path.as_ref();
    warning(path, &fs::metadata(path).ok()?)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;

    use super::*;

    #[test]
    fn who_may_read_an_image_is_told_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a b.snap");
        fs::write(&path, "x").unwrap();
        for (mode, who) in [
            (0o600, None),
            (0o400, None),
            (0o622, None),
            (0o640, Some("its group may read")),
            (0o644, Some("everybody may read")),
            (0o604, Some("everybody may read")),
        ] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let told = exposure(&path);
            assert_eq!(told.is_some(), who.is_some(), "{mode:o}: {told:?}");
            if let Some((told, who)) = told.zip(who) {
                let remedy = format!("`chmod 600 '{}'`", path.display());
                assert!(told.starts_with(who) && told.ends_with(&remedy), "{told}");
            }
        }
    }
}
