//! The server: connections, routes, who may ask, and how it goes down.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{self, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{any, get, post};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_stream::StreamExt as _;

use super::api::chat::ChatCompletion;
use super::api::completions::Completion;
use super::api::responses::ModelResponse;
use super::api::tokens;
use super::error::ApiError;
use super::page;
use super::peers::Peers;
use super::reports;
use super::state::{Models, State};

type Shared = Arc<State>;
type Result<T> = std::result::Result<T, ApiError>;

/// Connections at a time; more wait to be taken.
pub const CONNECTIONS: usize = 4096;

/// Connections at a time that are told that there are too many of their client's; others are closed without a word.
const SENT_AWAY: usize = 64;

/// For telling one so.
const FAREWELL: Duration = Duration::from_secs(1);

/// For the headers of a request to come, the first and every later one of a connection.
const HEADER_TIME: Duration = Duration::from_secs(10);

/// For the body of a request to come.
const BODY_TIME: Duration = Duration::from_secs(120);

/// How many times the largest body is read of one that is too large.
const READ_ON: usize = 16;

/// For what was written last to be read when the server goes down.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// All routes.
pub fn router(state: Shared) -> Router {
    // What costs something, or tells something, is for those with a key.
    let guarded = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/v1/responses", post(responses))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/reports", get(list_reports))
        .route("/reports/{name}", get(report))
        .layer(from_fn_with_state(state.clone(), guard));
    let mut open = Router::new()
        .route("/health", any(health))
        .route("/ping", any(health))
        .route("/version", get(version))
        .route("/metrics", get(metrics));
    if state.page {
        open = open.route("/", get(async || page::page()));
    }
    guarded
        .merge(open)
        .fallback(async |request: Request| {
            ApiError::not_found(format!("there is no {} {}", request.method(), request.uri().path()))
        })
        .method_not_allowed_fallback(async |request: Request| {
            ApiError::method(format!("{} is not asked with {}", request.uri().path(), request.method()))
        })
        .layer(from_fn_with_state(state.clone(), around))
        .with_state(state)
}

/// Answers on `listener` until `stop` comes; then finishes what has begun, for `patience` at most.
///
/// # Errors
/// When requests were still under way after that.
pub async fn serve(
    listener: TcpListener,
    state: Shared,
    stop: impl Future<Output = ()>,
    patience: Duration,
) -> std::io::Result<()> {
    let router = router(state.clone());
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(state.connections));
    let peers = Arc::new(Peers::new(state.connections_of_one));
    let sent_away = Arc::new(Semaphore::new(SENT_AWAY));
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME).max_buf_size(64 << 10);
    let accept = async {
        loop {
            // Semaphores that are never closed always give.
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let (stream, address) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(e) => {
                    // Out of descriptors, most likely; some will be given back.
                    tracing::warn!("a connection cannot be taken: {e}");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                    continue;
                }
            };
            let Some(seat) = peers.seat(address.ip()) else {
                tracing::debug!(%address, "a client has as many connections as one may have");
                if let Ok(farewell) = sent_away.clone().try_acquire_owned() {
                    let service = TowerToHyperService::new(sending_away(state.connections_of_one));
                    let connection = builder.serve_connection(TokioIo::new(stream), service);
                    tokio::spawn(async move {
                        let _ = tokio::time::timeout(FAREWELL, connection).await;
                        drop(farewell);
                    });
                }
                continue;
            };
            let _ = stream.set_nodelay(true);
            let service = TowerToHyperService::new(router.clone());
            let connection = graceful.watch(builder.serve_connection(TokioIo::new(stream), service));
            tokio::spawn(async move {
                if let Err(e) = connection.await {
                    tracing::debug!("a connection ended: {e}");
                }
                drop((place, seat));
            });
        }
    };
    let drained = async {
        stop.await;
        tracing::info!(under_way = state.inside(), "going down: nothing new is taken");
        state.draining.store(true, Ordering::Release);
        let end = Instant::now() + patience;
        while state.inside() > 0 && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // Connections are taken all the while, and told that the server goes down.
    tokio::select! {
        () = accept => {}
        () = drained => {}
    }
    let left = state.inside();
    state.models.all().for_each(|model| model.worker.cut());
    let _ = tokio::time::timeout(LAST_WORDS, graceful.shutdown()).await;
    if left > 0 {
        return Err(std::io::Error::other(format!("{left} answers were not finished after {patience:?}")));
    }
    Ok(())
}

/// What is answered on a connection of a client that has too many.
fn sending_away(most: usize) -> Router {
    Router::new().fallback(async move || ([(header::CONNECTION, "close")], ApiError::crowded(most)))
}

/// Who has no key is not let in, nor anybody when the server goes down.
async fn guard(extract::State(state): extract::State<Shared>, request: Request, next: Next) -> Response {
    let preflight = request.method() == Method::OPTIONS;
    let key = |headers: &HeaderMap| {
        let bearer = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).map(str::to_owned);
        // Case does not count in the scheme's name.
        bearer.and_then(|v| {
            v.split_once(' ').filter(|(s, _)| s.eq_ignore_ascii_case("bearer")).map(|(_, k)| k.trim().to_owned())
        })
    };
    if !preflight && !state.admits(key(request.headers()).as_deref()) {
        return ApiError::unauthorized("a key is needed: `Authorization: Bearer KEY`").into_response();
    }
    if request.method() == Method::POST && state.draining.load(Ordering::Acquire) {
        return ApiError::draining().into_response();
    }
    next.run(request).await
}

/// Around everything: other pages' rights, headers, the log.
async fn around(extract::State(state): extract::State<Shared>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let origin = request.headers().get(header::ORIGIN).cloned();
    let mut response = match foreign(&state, &request) {
        Some(refused) => refused.into_response(),
        // What a browser asks before it lets another page ask.
        None if method == Method::OPTIONS => StatusCode::NO_CONTENT.into_response(),
        None => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if let Some(origin) =
        origin.filter(|o| state.origins.iter().any(|known| known == "*" || known.as_bytes() == o.as_bytes()))
    {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::VARY, HeaderValue::from_static("Origin"));
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("authorization, content-type"));
    }
    let (status, seconds) = (response.status().as_u16(), began.elapsed().as_secs_f64());
    match path.as_str() {
        // Asked every few seconds by those who watch.
        "/health" | "/ping" | "/metrics" => tracing::debug!(%method, path, status, seconds),
        _ => tracing::info!(%method, path, status, seconds),
    }
    response
}

/// Why a request of a page that is not ours is refused: browsers let any page send one, and names that lead here are easily
/// made.
fn foreign(state: &State, request: &Request) -> Option<ApiError> {
    let text = |name| request.headers().get(name).and_then(|v: &HeaderValue| v.to_str().ok());
    let host = text(header::HOST).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, port)| if port.contains(']') { host } else { name });
    let known = name == "localhost" || name.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok();
    if state.local && !known && !name.is_empty() && !state.hosts.iter().any(|h| h == name) {
        return Some(ApiError::forbidden(format!(
            "`{name}` is not a name of this server, which listens for this machine only; --allowed-hosts adds it"
        )));
    }
    let origin = text(header::ORIGIN)?;
    let own = origin.split_once("://").is_some_and(|(_, authority)| authority == host);
    let allowed = own || state.origins.iter().any(|o| o == "*" || o == origin);
    (!allowed).then(|| ApiError::forbidden(format!("pages of {origin} may not ask; --allowed-origins lets them")))
}

/// A request's body, whole. What is too large is read to its end all the same, within bounds, and kept nowhere: who is still
/// writing would not hear the answer.
async fn body(state: &State, body: Body) -> Result<Vec<u8>> {
    let read = async {
        let (mut stream, mut whole, mut length) = (body.into_data_stream(), Vec::new(), 0usize);
        while let Some(piece) = stream.next().await {
            let piece = piece.map_err(|e| ApiError::bad(format!("the body: {e}")))?;
            length = length.saturating_add(piece.len());
            if length <= state.body {
                whole.extend_from_slice(&piece);
            } else {
                whole = Vec::new();
            }
            if length > state.body.saturating_mul(READ_ON) {
                break;
            }
        }
        if length > state.body { Err(ApiError::too_large(state.body)) } else { Ok(whole) }
    };
    let late = || ApiError::bad(format!("the body did not come within {BODY_TIME:?}"));
    tokio::time::timeout(BODY_TIME, read).await.unwrap_or_else(|_| Err(late()))
}

/// Understands a request away from the threads that serve connections: templates, tokenizers and grammars take their time.
async fn understand<T: Send + 'static>(
    state: Shared,
    request: Request,
    understand: impl FnOnce(&Models, &[u8]) -> Result<T> + Send + 'static,
) -> Result<T> {
    let encoding = request.headers().get(header::CONTENT_ENCODING);
    if encoding.is_some_and(|e| e != "identity") {
        return Err(ApiError::encoding());
    }
    let body = body(&state, request.into_body()).await?;
    match tokio::task::spawn_blocking(move || understand(&state.models, &body)).await {
        Ok(result) => result,
        Err(e) => {
            tracing::error!("a request could not be understood: {e}");
            Err(ApiError::failed("the request led to a fault of the server, which its log has"))
        }
    }
}

async fn chat(extract::State(state): extract::State<Shared>, request: Request) -> Result<Response> {
    understand(state, request, ChatCompletion::begin).await?.respond().await
}

async fn completions(extract::State(state): extract::State<Shared>, request: Request) -> Result<Response> {
    understand(state, request, Completion::begin).await?.respond().await
}

async fn responses(extract::State(state): extract::State<Shared>, request: Request) -> Result<Response> {
    understand(state, request, ModelResponse::begin).await?.respond().await
}

async fn tokenize(extract::State(state): extract::State<Shared>, request: Request) -> Result<Json<Value>> {
    understand(state, request, tokens::tokenize).await.map(Json)
}

async fn detokenize(extract::State(state): extract::State<Shared>, request: Request) -> Result<Json<Value>> {
    understand(state, request, tokens::detokenize).await.map(Json)
}

fn describe(model: &super::model::ServedModel, name: &str) -> Value {
    json!({"id": name, "object": "model", "created": model.created, "owned_by": "recoup", "root": model.name(),
        "parent": null, "max_model_len": model.context, "formats": model.formats,
        "has_chat_template": model.text.template().is_some(),
        "thinking_switch": model.thinking_switch})
}

async fn models(extract::State(state): extract::State<Shared>) -> Json<Value> {
    let all = state.models.all().flat_map(|model| model.names.iter().map(|name| describe(model, name)));
    Json(json!({"object": "list", "data": all.collect::<Vec<_>>()}))
}

/// The end of an address, which names something.
struct Named(String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        let name = extract::Path::<String>::from_request_parts(parts, state).await;
        name.map(|name| Self(name.0)).map_err(|e| ApiError::bad(format!("the address: {}", e.body_text())))
    }
}

async fn model(extract::State(state): extract::State<Shared>, Named(name): Named) -> Result<Json<Value>> {
    Ok(Json(describe(&*state.models.named(Some(&name))?, &name)))
}

async fn health(extract::State(state): extract::State<Shared>) -> StatusCode {
    if state.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

async fn metrics(extract::State(state): extract::State<Shared>) -> Response {
    let engines: Vec<_> = state.models.all().map(|model| (model.name(), model.worker.stats())).collect();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], state.metrics.text(&engines)).into_response()
}

async fn list_reports(extract::State(state): extract::State<Shared>) -> Result<Json<Value>> {
    reports::list(state.reports.as_deref()).map(Json)
}

async fn report(extract::State(state): extract::State<Shared>, Named(name): Named) -> Result<Response> {
    let read = move || reports::one(state.reports.as_deref().map(Path::new), &name);
    tokio::task::spawn_blocking(read).await.unwrap_or_else(|e| Err(ApiError::failed(e.to_string())))
}
