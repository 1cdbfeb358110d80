//! The profile of a snapshot for another site: what a revert there changes on the recorded command
//! line, as a repository keeps it beside the snapshot.

use std::collections::BTreeMap;

use crate::guest::GuestError;
use crate::guest::start::ports::NewPort;
use crate::guest::start::rewrite::RewriteOptions;

/// Values of options by their names: `path` (`OLD=NEW`), `port` (`OLD=NEW`, or `OLD=auto`), `netdev`
/// (`ID=SPEC`). Names that are not known are left to later versions.
pub type Profile = BTreeMap<String, Vec<String>>;

impl RewriteOptions {
    /// Adds a profile. Where these options have a rule of their own for a path, a port or a network, it
    /// counts in place of the profile's.
    ///
    /// # Errors
    /// [`GuestError::Profile`] when a value has not the form that it should have.
    pub fn add_profile(&mut self, profile: &Profile) -> Result<(), GuestError> {
        let of = |name: &str| profile.get(name).into_iter().flatten();
        let wrong = |name: &str, value: &str| GuestError::Profile {
            option: name.to_owned(),
            value: value.to_owned(),
        };
        for value in of("path") {
            let (old, new) = pair(value).ok_or_else(|| wrong("path", value))?;
            if !self.paths.iter().any(|(given, _)| *given == old) {
                self.paths.push((old, new));
            }
        }
        for value in of("port") {
            let (old, new) = NewPort::read_rule(value).ok_or_else(|| wrong("port", value))?;
            if !self.ports.iter().any(|(given, _)| *given == old) {
                self.ports.push((old, new));
            }
        }
        for value in of("netdev") {
            let (id, spec) = pair(value).ok_or_else(|| wrong("netdev", value))?;
            if !self.netdevs.iter().any(|(given, _)| *given == id) {
                self.netdevs.push((id, spec));
            }
        }
        Ok(())
    }
}

/// `A=B`, neither of them empty.
fn pair(text: &str) -> Option<(String, String)> {
    let (left, right) = text.split_once('=')?;
    (!left.is_empty() && !right.is_empty()).then(|| (left.to_owned(), right.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(name: &str, values: &[&str]) -> Profile {
        [(name.to_owned(), values.iter().map(|value| value.to_string()).collect())].into()
    }

    #[test]
    fn what_is_given_counts_in_place_of_the_profile() {
        let mut options = RewriteOptions {
            paths: vec![("/vm".into(), "/given".into())],
            ports: vec![(22, NewPort::Number(2022))],
            ..RewriteOptions::default()
        };
        let mut all = profile("path", &["/vm=/there", "/iso=/other"]);
        all.extend(profile("port", &["22=2222", "80=auto"]));
        all.extend(profile("netdev", &["lan=tap,ifname=tap0"]));
        all.extend(profile("of-a-later-version", &["?"]));
        // Twice is as good as once.
        options.add_profile(&all).unwrap();
        options.add_profile(&all).unwrap();
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(options.paths, [pair("/vm", "/given"), pair("/iso", "/other")]);
        assert_eq!(options.ports, [(22, NewPort::Number(2022)), (80, NewPort::Free)]);
        assert_eq!(options.netdevs, [pair("lan", "tap,ifname=tap0")]);
    }

    #[test]
    fn what_has_another_form_is_an_error() {
        for (name, value) in [("path", "/a"), ("path", "=/a"), ("port", "1=x"), ("netdev", "n=")] {
            let error =
                RewriteOptions::default().add_profile(&profile(name, &[value])).unwrap_err();
            assert!(error.to_string().contains(value), "{error}");
        }
    }
}
