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

/// What is read of the body of a refusal.
const MAX_REFUSAL: usize = 64 << 10;

/// Connects as the library does.
#[derive(Debug, Default)]
pub struct Connector(ReqwestConnector);

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        self.0.connect(options).map(|client| HttpClient::new(Service(client)))
    }
}

#[derive(Debug)]
struct Service(HttpClient);

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
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let answer = self.0.execute(request).await?;
        let status = answer.status().as_u16();
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
