//! WebDAV, in which servers differ: some put on conditions, which the library does not ask for, and
//! some refuse to list more than a folder at once, which it does ask for.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::http::{HttpBuilder, HttpStore};
use object_store::path::Path;
use object_store::{
    ClientOptions, CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    RetryConfig,
};

use super::failure::is_forbidden;
use super::http::Connector;

/// How many folders are listed at once.
const FOLDERS_AT_ONCE: usize = 16;

/// A server that speaks WebDAV.
#[derive(Debug)]
pub struct WebDav {
    store: Arc<HttpStore>,
    /// The same, but what it puts is put on the condition that nothing is there. Not all servers mind that.
    creating: HttpStore,
    /// Whether the server lists single folders alone.
    by_folder: Arc<AtomicBool>,
}

impl WebDav {
    /// The server at this URL, which has no path.
    pub fn new(url: &str, client: ClientOptions, retry: RetryConfig) -> Result<WebDav> {
        let build = |connector| {
            let builder = HttpBuilder::new().with_url(url).with_client_options(client.clone());
            builder.with_retry(retry.clone()).with_http_connector(connector).build()
        };
        Ok(WebDav {
            store: Arc::new(build(Connector::default())?),
            creating: build(Connector::creating())?,
            by_folder: Arc::default(),
        })
    }
}

impl fmt::Display for WebDav {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WebDAV")
    }
}

#[async_trait]
impl ObjectStore for WebDav {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        match options.mode {
            PutMode::Create => {
                let options = PutOptions { mode: PutMode::Overwrite, ..options };
                self.creating.put_opts(location, payload, options).await
            }
            _ => self.store.put_opts(location, payload, options).await,
        }
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.store.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (store, by_folder) = (Arc::clone(&self.store), Arc::clone(&self.by_folder));
        let prefix = prefix.cloned();
        let list = async move {
            if !by_folder.load(Ordering::Relaxed) {
                match store.list(prefix.as_ref()).try_collect::<Vec<_>>().await {
                    // Whoever may not list at all is told so by the next request.
                    Err(error) if is_forbidden(&error) => by_folder.store(true, Ordering::Relaxed),
                    listed => return listed,
                }
            }
            list_by_folder(&store, prefix).await
        };
        let listed = stream::once(list).map_ok(|found| stream::iter(found.into_iter().map(Ok)));
        listed.try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }
}

/// Lists a folder, and then, level by level, those in it.
async fn list_by_folder(store: &HttpStore, prefix: Option<Path>) -> Result<Vec<ObjectMeta>> {
    let (mut found, mut folders) = (Vec::new(), vec![prefix]);
    while !folders.is_empty() {
        let level: Vec<ListResult> = stream::iter(folders)
            .map(|folder| async move { store.list_with_delimiter(folder.as_ref()).await })
            .buffer_unordered(FOLDERS_AT_ONCE)
            .try_collect()
            .await?;
        folders = Vec::new();
        for listed in level {
            found.extend(listed.objects);
            folders.extend(listed.common_prefixes.into_iter().map(Some));
        }
    }
    Ok(found)
}
