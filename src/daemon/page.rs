//! The status page, and what a browser is to allow it: its own style and script, and requests to
//! this daemon.

use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::{Html, IntoResponse};

const PAGE: &str = include_str!("page.html");

/// Names the page's style and script by their hashes, which a test keeps in step with it. Its icon is
/// an image in its own text. No text becomes markup or script (`require-trusted-types-for`).
const POLICY: &str = "default-src 'none'; \
     style-src 'sha256-mD2sI7urHUmZSqW36sXKq87J5gJhqcUUi4Ll/nOaqaw='; \
     script-src 'sha256-Jb9IhAYzRw5iNbfcl+1JNe6bRESlDEk7AArdhEIDKo4='; \
     img-src data:; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'; \
     require-trusted-types-for 'script'; trusted-types 'none'";

/// `GET /`.
pub(super) async fn page() -> impl IntoResponse {
    let headers = [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers, Html(PAGE))
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::prelude::BASE64_STANDARD;
    use sha2::{Digest, Sha256};

    use super::*;

    /// What stands in the page's only element of this name.
    fn inside(name: &str) -> &'static str {
        let (begin, end) = (format!("<{name}>"), format!("</{name}>"));
        assert_eq!((PAGE.matches(&begin).count(), PAGE.matches(&end).count()), (1, 1), "{name}");
        let (_, rest) = PAGE.split_once(&begin).unwrap();
        rest.split_once(&end).unwrap().0
    }

    #[test]
    fn the_policy_names_the_style_and_the_script() {
        for name in ["style", "script"] {
            let hash = BASE64_STANDARD.encode(Sha256::digest(inside(name)));
            let source = format!("{name}-src 'sha256-{hash}';");
            assert!(POLICY.contains(&source), "page.html has changed; POLICY is to say {source}");
        }
    }

    #[test]
    fn the_page_has_all_that_it_needs() {
        for elsewhere in ["src=", "@import", "url(", "rel=\"stylesheet\""] {
            assert!(!PAGE.contains(elsewhere), "{elsewhere}");
        }
    }

    /// What a daemon says may hold names that somebody else has chosen.
    #[test]
    fn no_text_becomes_markup() {
        let markup = ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("];
        for way in markup {
            assert!(!inside("script").contains(way), "{way}");
        }
    }
}
