//! Several guests of one image, told apart.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What tells one clone of a guest from the others on its host.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CloneIdentity {
    /// Its number.
    pub number: u32,
    /// Its name.
    pub name: String,
    /// Its own directory, for [`RewriteOptions::own`](crate::RewriteOptions::own).
    pub directory: PathBuf,
}

impl CloneIdentity {
    /// The clone of this number. `name` is a template in which `{n}` stands for the number;
    /// `directory` one in which `{name}` stands for the name as well.
    pub fn new(number: u32, name: &str, directory: &str) -> CloneIdentity {
        let number_text = number.to_string();
        let name = replace(name, &[("{n}", &number_text)]);
        let directory = replace(directory, &[("{n}", &number_text), ("{name}", &name)]).into();
        CloneIdentity { number, name, directory }
    }

    /// A text of this clone's: `{n}`, `{name}` and `{dir}` in it stand for its number, name and
    /// directory. Other braces are left as they are.
    pub fn expand(&self, template: &str) -> String {
        let (number, directory) = (self.number.to_string(), self.directory.to_string_lossy());
        replace(template, &[("{n}", &number), ("{name}", &self.name), ("{dir}", &directory)])
    }
}

/// What a hook finds in its environment of a guest that runs, and of the clone that it is.
pub(crate) fn environment(
    clone: Option<(&str, &Path)>,
    pid: Option<i32>,
    qmp: Option<&Path>,
    ports: &BTreeMap<u16, u16>,
) -> [(&'static str, OsString); 5] {
    let (name, directory) = clone.unzip();
    let directory = directory
        .map(|path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned()).into_os_string());
    // Numbers alone: they can always be written.
    let ports = serde_json::to_string(ports).unwrap_or_default();
    [
        ("SNAPBACK_CLONE", name.unwrap_or_default().into()),
        ("SNAPBACK_DIR", directory.unwrap_or_default()),
        ("SNAPBACK_PID", pid.map(|pid| pid.to_string()).unwrap_or_default().into()),
        ("SNAPBACK_QMP", qmp.map(|path| path.as_os_str().to_owned()).unwrap_or_default()),
        ("SNAPBACK_PORTS", ports.into()),
    ]
}

/// Replaces placeholders in one pass: what replaces one is not looked into again.
fn replace(template: &str, values: &[(&str, &str)]) -> String {
    let mut text = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find('{') {
        let (before, behind) = rest.split_at(at);
        text.push_str(before);
        let known = values.iter().find(|(placeholder, _)| behind.starts_with(placeholder));
        let (value, len) =
            known.map_or(("{", 1), |(placeholder, value)| (value, placeholder.len()));
        text.push_str(value);
        rest = &behind[len..];
    }
    text + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_replaced_once_and_other_braces_left_alone() {
        let clone = CloneIdentity::new(7, "w{n}", "/run/{name}/{n}");
        assert_eq!((clone.name.as_str(), clone.directory.to_str()), ("w7", Some("/run/w7/7")));
        assert_eq!(clone.expand("{dir}/q:222{n},{name}"), "/run/w7/7/q:2227,w7");
        let json = r#"{"driver":"x","id":"{name}","a":{}}{"#;
        assert_eq!(clone.expand(json), r#"{"driver":"x","id":"w7","a":{}}{"#);
        let odd = CloneIdentity::new(1, "{dir}{n}", "/{name}");
        assert_eq!(odd.expand("{name}"), "{dir}1");
    }
}
