//! Credentials for S3 in the file that its own tools read, where the environment has none.

use std::path::PathBuf;

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
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    if set("AWS_ACCESS_KEY_ID").is_some() || set("AWS_WEB_IDENTITY_TOKEN_FILE").is_some() {
        return None;
    }
    let home = || Some(PathBuf::from(set("HOME")?).join(".aws/credentials"));
    let path = set("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from).or_else(home)?;
    if path.metadata().ok()?.len() > MAX_FILE {
        return None;
    }
    let name = set("AWS_PROFILE").unwrap_or_else(|| "default".into());
    read(&std::fs::read_to_string(path).ok()?, &name)
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
}
