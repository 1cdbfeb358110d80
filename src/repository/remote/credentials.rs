//! Credentials in the files that other tools read: for S3, where the environment has none, in
//! `~/.aws/credentials`; for servers that speak WebDAV in `~/.netrc`.

use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::HeaderValue;

/// The longest file.
const MAX_FILE: u64 = 1 << 20;

/// What a profile holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Profile {
    pub key_id: String,
    pub secret: String,
    pub token: Option<String>,
}

/// The profile that the environment names, or `default`, unless the environment has credentials.
pub fn profile() -> Option<Profile> {
    if set("AWS_ACCESS_KEY_ID").is_some() || set("AWS_WEB_IDENTITY_TOKEN_FILE").is_some() {
        return None;
    }
    let name = set("AWS_PROFILE").unwrap_or_else(|| "default".into());
    read(&file("AWS_SHARED_CREDENTIALS_FILE", ".aws/credentials")?, &name)
}

/// What shows a server that speaks HTTP who we are, if the file has an entry for this host.
pub fn basic(host: &str) -> Option<HeaderValue> {
    let (login, password) = read_netrc(&file("NETRC", ".netrc")?, host)?;
    let encoded = STANDARD.encode(format!("{login}:{password}"));
    let mut header = HeaderValue::from_str(&format!("Basic {encoded}")).ok()?;
    header.set_sensitive(true);
    Some(header)
}

fn set(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The file that this variable names, or this one of the user's home.
fn file(variable: &str, in_home: &str) -> Option<String> {
    let home = || Some(PathBuf::from(set("HOME")?).join(in_home));
    let path = set(variable).map(PathBuf::from).or_else(home)?;
    if path.metadata().ok()?.len() > MAX_FILE {
        return None;
    }
    std::fs::read_to_string(path).ok()
}

/// Login and password of a host, or those of `default`. As other tools do, it takes words wherever lines end;
/// macros are not looked for.
fn read_netrc(text: &str, host: &str) -> Option<(String, String)> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    let mut words = lines.flat_map(str::split_whitespace);
    let (mut is_meant, mut login, mut password) = (false, None, None);
    while let Some(word) = words.next() {
        match word {
            // The first entry that is meant counts.
            "machine" | "default" if is_meant => break,
            "machine" => is_meant = words.next() == Some(host),
            "default" => is_meant = true,
            "login" if is_meant => login = words.next(),
            "password" if is_meant => password = words.next(),
            "login" | "password" | "account" => drop(words.next()),
            _ => {}
        }
    }
    Some((login?.to_owned(), password?.to_owned()))
}

fn read(text: &str, name: &str) -> Option<Profile> {
    let (mut profile, mut is_meant) = (Profile::default(), false);
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            is_meant = section.trim() == name;
        } else if let (true, Some((key, value))) = (is_meant, line.split_once('=')) {
            let value = value.trim().to_owned();
            match key.trim() {
                "aws_access_key_id" => profile.key_id = value,
                "aws_secret_access_key" => profile.secret = value,
                "aws_session_token" => profile.token = Some(value),
                _ => {}
            }
        }
    }
    (!profile.key_id.is_empty() && !profile.secret.is_empty()).then_some(profile)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_that_is_meant_is_read() {
        let text = "[default]\naws_access_key_id = a\naws_secret_access_key=b=\n# c\n[ other ]\n\
                    aws_access_key_id=d\naws_secret_access_key = e\naws_session_token = f\n[none]";
        let of = |key_id: &str, secret: &str, token: Option<&str>| Profile {
            key_id: key_id.into(),
            secret: secret.into(),
            token: token.map(str::to_owned),
        };
        assert_eq!(read(text, "default"), Some(of("a", "b=", None)));
        assert_eq!(read(text, "other"), Some(of("d", "e", Some("f"))));
        assert_eq!((read(text, "none"), read(text, "nobody")), (None, None));
    }

    #[test]
    fn the_host_that_is_meant_is_found_or_the_default() {
        let text = "# machine a login no password no\nmachine b login c password d\n\
                    machine a\n  login e\n  account x\n  password f#g\ndefault login h password i\n\
                    machine z login k password l";
        let of = |host: &str| read_netrc(text, host);
        let both = |login: &str, password: &str| Some((login.to_owned(), password.to_owned()));
        assert_eq!((of("a"), of("b")), (both("e", "f#g"), both("c", "d")));
        assert_eq!((of("none"), of("z")), (both("h", "i"), both("h", "i")));
        assert_eq!(read_netrc("machine a login b", "a"), None);
    }
}
