//! Connections by HTTP, whose refusals keep their status: the store's library has it in a type of
//! its own only.

use std::error::Error;
use std::fmt;

use async_trait::async_trait;
use http_body_util::{BodyExt, Limited};
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
    ReqwestConnector,
};
use reqwest::header::{HeaderValue, IF_NONE_MATCH};
use reqwest::{Method, StatusCode};

/// What is read of the body of a refusal.
const MAX_REFUSAL: usize = 64 << 10;

/// Connects as the library does.
#[derive(Debug, Default)]
pub struct Connector {
    library: ReqwestConnector,
    creates: bool,
}

impl Connector {
    /// One that puts on the condition that nothing is there.
    pub fn creating() -> Connector {
        Connector { creates: true, ..Connector::default() }
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let creates = self.creates;
        self.library.connect(options).map(|client| HttpClient::new(Service { client, creates }))
    }
}

#[derive(Debug)]
struct Service {
    client: HttpClient,
    creates: bool,
}

/// A refusal that the library knows no type for.
#[derive(Debug)]
pub struct Answered {
    /// The status of HTTP.
    pub status: u16,
    /// The error's code in the body, such as `SlowDown`, or nothing.
    pub code: String,
}

impl fmt::Display for Answered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {} {}", self.status, self.code)
    }
}

impl Error for Answered {}

#[async_trait]
impl HttpService for Service {
    async fn call(&self, mut request: HttpRequest) -> Result<HttpResponse, HttpError> {
        if self.creates && request.method() == Method::PUT {
            request.headers_mut().insert(IF_NONE_MATCH, HeaderValue::from_static("*"));
        }
        let makes_folder = request.method().as_str() == "MKCOL";
        let mut answer = self.client.execute(request).await?;
        let status = answer.status().as_u16();
        if makes_folder && status == 405 {
            // Somebody else has just made it (RFC 4918, 9.3.1).
            *answer.status_mut() = StatusCode::CREATED;
            return Ok(answer);
        }
        if !matches!(status, 400 | 401 | 403 | 408 | 429 | 500..) {
            return Ok(answer);
        }
        let body = Limited::new(answer.into_body(), MAX_REFUSAL).collect().await;
        let body = body.map(|body| body.to_bytes()).unwrap_or_default();
        let code = code(&String::from_utf8_lossy(&body));
        Err(HttpError::new(HttpErrorKind::Unknown, Answered { status, code }))
    }
}

/// The code in the body of a refusal: `<Code>SlowDown</Code>` of S3 and Azure.
fn code(body: &str) -> String {
    let code = body.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
    let is_word = |code: &&str| code.len() < 64 && code.bytes().all(|b| b.is_ascii_alphanumeric());
    code.map(|(code, _)| code).filter(is_word).unwrap_or_default().to_owned()
}
