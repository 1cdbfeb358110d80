//! `revert --count`: several guests of one image, each under a name and in a directory of its own.

use std::path::{Path, PathBuf};

use clap::Args;
use tokio::task::JoinSet;

use super::failure::Failure;
use super::output::Output;
use crate::kind::ErrorKind;
use crate::revert::CloneIdentity;

/// The most clones of one command.
const MOST: u32 = 10_000;

/// How the clones of a guest are told apart.
#[derive(Args, Clone)]
pub(super) struct ClonesArgs {
    /// Start so many clones of the guest. Each has a directory of its own, where its sockets, logs
    /// and overlays go, and free ports of this host in the place of the recorded ones, which the
    /// event `running` names. In --path, --port, --netdev, --qmp, --overlay-dir, --log and the
    /// arguments behind -- {n} stands for a clone's number, {name} for its name and {dir} for its
    /// directory
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST)))]
    count: Option<u32>,
    /// The name of each clone, with {n} for its number, from 1 on [default: the image's name,
    /// without its ending, and -{n}]
    #[arg(long, value_name = "TEMPLATE")]
    name: Option<String>,
    /// The directory of each clone, with {n} and {name} [default: {name} in the working directory]
    #[arg(long, value_name = "TEMPLATE")]
    dir: Option<String>,
    /// Set for a server of clones: the number of the only one that it serves
    #[arg(long, hide = true)]
    pub only: Option<u32>,
}

impl ClonesArgs {
    /// The clones of this image that are asked for, or one.
    pub fn identities_or_one(&self, image: &Path) -> Result<Vec<CloneIdentity>, Failure> {
        let count = self.count.or(Some(1));
        let clones = ClonesArgs { count, ..self.clone() }.identities(image)?;
        Ok(clones.unwrap_or_default())
    }

    /// The clones of this image that are asked for; none where the guest itself is.
    pub fn identities(&self, image: &Path) -> Result<Option<Vec<CloneIdentity>>, Failure> {
        if self.count.is_none() && self.name.is_none() && self.dir.is_none() {
            return Ok(None);
        }
        let invalid = |what: &str| Err(Failure::said(ErrorKind::OptionsInvalid, what.to_owned()));
        let stem = image.file_stem().unwrap_or_default().to_string_lossy();
        let name = self.name.clone().unwrap_or_else(|| format!("{stem}-{{n}}"));
        let directory = self.dir.as_deref().unwrap_or("{name}");
        let count = self.count.unwrap_or(1);
        let has_number = |template: &str| template.contains("{n}");
        if count > 1 && !has_number(&name) {
            return invalid(
                "--name gives all clones one name: it needs {n}, such as --name 'w{n}'",
            );
        }
        if count > 1 && !has_number(directory) && !directory.contains("{name}") {
            return invalid(
                "--dir gives all clones one directory: it needs {name} or {n}, such as --dir \
                 '/run/{name}'",
            );
        }
        if name.contains('/') {
            return invalid("--name is no path: a name without / goes into --dir as {name}");
        }
        let numbers = self.only.map_or(1..=count, |only| only..=only);
        Ok(Some(numbers.map(|number| CloneIdentity::new(number, &name, directory)).collect()))
    }
}

/// A path of one clone's. One that is not UTF-8 holds no placeholder.
pub(super) fn expanded(path: &Path, clone: &CloneIdentity) -> PathBuf {
    path.to_str().map_or_else(|| path.to_owned(), |text| clone.expand(text).into())
}

/// Runs `each` for all clones at the same time. A failure of one is told as its own; the others go
/// on. When some have failed the whole does; when all have, for the first one's reason.
pub(super) async fn for_each<F>(
    clones: Vec<CloneIdentity>,
    output: &Output,
    mut each: impl FnMut(CloneIdentity, Output) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>> + Send + 'static,
{
    let total = clones.len();
    let mut tasks = JoinSet::new();
    for clone in clones {
        let name = clone.name.clone();
        let task = each(clone, output.of_clone(&name));
        tasks.spawn(async move { (name, task.await) });
    }
    let mut failed: Vec<(String, ErrorKind)> = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        let (name, result) = ended.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
        if let Err(failure) = result {
            if total == 1 {
                return Err(failure);
            }
            output.of_clone(&name).failure(&failure);
            failed.push((name, failure.kind()));
        }
    }
    let kind = match failed.first() {
        None => return Ok(()),
        Some((_, kind)) if failed.len() == total => *kind,
        Some(_) => ErrorKind::ClonesFailed,
    };
    let names: Vec<&str> = failed.iter().map(|(name, _)| name.as_str()).collect();
    let message = format!("{} of {total} clones failed: {}", failed.len(), names.join(", "));
    Err(Failure::said(kind, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(
        count: Option<u32>,
        name: Option<&str>,
        dir: Option<&str>,
    ) -> Result<Vec<String>, String> {
        let args =
            ClonesArgs { count, name: name.map(Into::into), dir: dir.map(Into::into), only: None };
        let clones = args.identities(Path::new("/images/vm.snap")).map_err(|e| e.message())?;
        let shown = |clone: &CloneIdentity| format!("{} {}", clone.name, clone.directory.display());
        Ok(clones.iter().flatten().map(shown).collect())
    }

    #[test]
    fn clones_are_told_apart_by_their_templates() {
        assert_eq!(of(None, None, None).unwrap(), [""; 0]);
        assert_eq!(of(Some(2), None, None).unwrap(), ["vm-1 vm-1", "vm-2 vm-2"]);
        let named = of(Some(2), Some("w{n}"), Some("/run/{name}")).unwrap();
        assert_eq!(named, ["w1 /run/w1", "w2 /run/w2"]);
        assert_eq!(of(None, Some("w"), Some("/run/x")).unwrap(), ["w /run/x"]);
        for (name, dir, named) in
            [("w", "/x/{n}", "--name"), ("w{n}", "/x", "--dir"), ("a/{n}", "{n}", "--name")]
        {
            let error = of(Some(2), Some(name), Some(dir)).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
