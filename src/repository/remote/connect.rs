//! The store that an address leads to.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig};
use reqwest::header::AUTHORIZATION;

use super::address::Address;
use super::credentials::{self, Profile};
use super::http::Connector;
use super::packed::PackedFile;
use super::webdav::WebDav;
use crate::repository::error::RepositoryError;

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);
/// How long a connection that nobody uses is kept.
const IDLE: Duration = Duration::from_secs(60);

/// The store, and where in it the repository lies. Credentials come from where they usually do: the
/// environment, this machine's role.
pub fn connect(
    address: &Address,
    create: bool,
) -> Result<(Arc<dyn ObjectStore>, Path), RepositoryError> {
    let refused =
        |problem: String| RepositoryError::Address { address: address.to_string(), problem };
    let url = match address {
        Address::Directory(path) => {
            if path.is_file() {
                return match create {
                    true => Err(RepositoryError::Exists(address.to_string())),
                    false => Ok((Arc::new(PackedFile::open(path)?), Path::default())),
                };
            }
            if create {
                // What lies there are secrets.
                let mut builder = DirBuilder::new();
                let made = builder.recursive(true).mode(0o700).create(path);
                made.map_err(|e| RepositoryError::io("making", path, e))?;
            }
            let store = LocalFileSystem::new_with_prefix(path)
                .map_err(|_| RepositoryError::NoRepository(address.to_string()))?;
            return Ok((Arc::new(store.with_fsync(true)), Path::default()));
        }
        Address::Store(url) => url,
    };
    // All connections share it; another part of the program may have chosen one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let parsed: url::Url = url.parse().map_err(|e| refused(format!("{e}")))?;
    let (scheme, prefix) = ObjectStoreScheme::parse(&parsed).map_err(|e| refused(e.to_string()))?;
    // Whoever writes http:// has decided.
    let is_plain = url.starts_with("http://");
    let client = |plain: bool| {
        ClientOptions::new()
            .with_allow_http(plain)
            .with_connect_timeout(CONNECT)
            .with_pool_idle_timeout(IDLE)
            .with_pool_max_idle_per_host(64)
            // Every request has a limit of its own, by its length.
            .with_timeout_disabled()
    };
    // We try again ourselves, and tell.
    let retry = RetryConfig {
        backoff: BackoffConfig::default(),
        max_retries: 0,
        retry_timeout: Duration::from_secs(1),
    };
    let built: object_store::Result<Arc<dyn ObjectStore>> = match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let endpoint = first_set(&["AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"]);
            let plain = is_plain || endpoint.as_ref().is_some_and(|url| url.starts_with("http://"));
            let mut builder = AmazonS3Builder::from_env().with_url(url);
            if let Some(endpoint) = endpoint {
                builder = builder.with_endpoint(endpoint);
            }
            if let Some(Profile { key_id, secret, token }) = credentials::profile() {
                builder = builder.with_access_key_id(key_id).with_secret_access_key(secret);
                builder = match token {
                    Some(token) => builder.with_token(token),
                    None => builder,
                };
            }
            let builder = builder.with_client_options(client(plain)).with_retry(retry);
            builder.with_http_connector(Connector::default()).build().map(|s| Arc::new(s) as _)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let endpoint = first_set(&["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"]);
            let plain = endpoint.is_some_and(|url| url.starts_with("http://"));
            let builder = MicrosoftAzureBuilder::from_env().with_url(url);
            let builder = builder.with_client_options(client(plain)).with_retry(retry);
            builder.with_http_connector(Connector::default()).build().map(|s| Arc::new(s) as _)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder = GoogleCloudStorageBuilder::from_env().with_url(url);
            // Which it is, the account's file says, which may name an emulator.
            let builder = builder.with_client_options(client(true)).with_retry(retry);
            builder.with_http_connector(Connector::default()).build().map(|s| Arc::new(s) as _)
        }
        ObjectStoreScheme::Http => {
            let mut client = client(is_plain);
            if let Some(header) = parsed.host_str().and_then(credentials::basic) {
                client =
                    client.with_default_headers([(AUTHORIZATION, header)].into_iter().collect());
            }
            let host = &parsed[..url::Position::BeforePath];
            WebDav::new(host, client, retry).map(|s| Arc::new(s) as _)
        }
        _ => return Err(refused("there is no such store".into())),
    };
    Ok((built.map_err(|e| refused(e.to_string()))?, prefix))
}

/// The first of these variables that is set.
fn first_set(names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| std::env::var(name).ok())
}
