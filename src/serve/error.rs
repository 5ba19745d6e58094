//! What a request is answered that cannot be met, in the form of OpenAI's API.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::backend::BackendError;
use crate::engine::EngineError;
use crate::logits::SamplingError;
use crate::text::TextError;

/// An error of one request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    status: StatusCode,
    /// OpenAI's `type`.
    kind: &'static str,
    /// For people.
    message: String,
    /// The parameter that is wrong.
    param: Option<String>,
    /// OpenAI's `code`.
    code: Option<&'static str>,
    /// Seconds after which another try is worth it.
    retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self { status, kind, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// The request itself is wrong.
    #[must_use]
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// Parameter `param` of the request is wrong.
    #[must_use]
    pub fn parameter(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::bad(message) }
    }

    /// The prompt is longer than the model's context.
    #[must_use]
    pub fn too_long(prompt: usize, context: usize) -> Self {
        let message =
            format!("the prompt has {prompt} tokens, but this model's maximum context length is {context} tokens");
        Self { code: Some("context_length_exceeded"), ..Self::bad(message) }
    }

    /// The prompt fills the model's context.
    #[must_use]
    pub fn no_room(prompt: usize) -> Self {
        let message = format!(
            "the prompt has {prompt} tokens, which leaves no room for an answer: this model's maximum context length is \
             {prompt} tokens of prompt and answer"
        );
        Self { code: Some("context_length_exceeded"), ..Self::bad(message) }
    }

    /// The body is larger than is read.
    #[must_use]
    pub fn too_large(limit: usize) -> Self {
        let message = format!("the body is larger than {} MiB (--max-body-mib)", limit >> 20);
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    /// The key is missing or none that is known.
    #[must_use]
    pub fn unauthorized(message: impl Into<String>) -> Self {
        let code = Some("invalid_api_key");
        Self { code, ..Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message) }
    }

    /// Not for whoever asks.
    #[must_use]
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "invalid_request_error", message)
    }

    /// The body is packed.
    #[must_use]
    pub fn encoding() -> Self {
        let message = "bodies are read as they are; send it without Content-Encoding";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", message)
    }

    /// There is no model of that name.
    #[must_use]
    pub fn no_model(name: &str, there: &str) -> Self {
        Self {
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..Self::not_found(format!("the model `{name}` is not served here; there is: {there}"))
        }
    }

    /// There is nothing at that address.
    #[must_use]
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// The address knows another method.
    #[must_use]
    pub fn method(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// More requests wait than are let in; 503, so that a router tries another replica.
    #[must_use]
    pub fn full(waiting: usize) -> Self {
        let message =
            format!("{waiting} sequences run or wait, as many as are let in (--max-num-seqs and --max-queue)");
        let full = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        Self { code: Some("overloaded"), retry_after: Some(1), ..full }
    }

    /// The server is going down.
    #[must_use]
    pub fn draining() -> Self {
        let message = "the server is shutting down; it finishes what it has begun and takes nothing new";
        let draining = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        Self { code: Some("shutting_down"), retry_after: Some(5), ..draining }
    }

    /// The server went down before the answer was finished.
    #[must_use]
    pub fn cut() -> Self {
        let message = "the server has shut down before the answer was finished (--shutdown-timeout)";
        let cut = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        Self { code: Some("shutting_down"), retry_after: Some(5), ..cut }
    }

    /// The client has as many connections as one may have.
    #[must_use]
    pub fn crowded(most: usize) -> Self {
        let message = format!(
            "{most} connections from this address are open, as many as one client may have (--max-connections-per-client)"
        );
        let crowded = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
        Self { code: Some("too_many_connections"), retry_after: Some(1), ..crowded }
    }

    /// Something failed here, which is not the request's fault.
    #[must_use]
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// The engine is no more.
    #[must_use]
    pub fn stopped() -> Self {
        Self::failed("the engine has stopped; the server's log says why")
    }

    /// The body that OpenAI's clients read; also an event of a stream that has begun.
    #[must_use]
    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }

    /// Its status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }
}

impl From<TextError> for ApiError {
    /// What a request's texts led to: a template's refusal is about the conversation.
    fn from(error: TextError) -> Self {
        match error {
            TextError::TemplateRefused { .. } | TextError::NotContinued { .. } | TextError::ReservedArgument { .. } => {
                Self::bad(error.to_string())
            }
            // A template that fails on what it was given, far more often than a template that always fails.
            other => Self::bad(format!("the prompt cannot be made: {other}")),
        }
    }
}

impl From<EngineError> for ApiError {
    /// Why the engine does not take a request.
    fn from(error: EngineError) -> Self {
        let message = error.to_string();
        match error {
            EngineError::PromptTooLong { prompt, capacity } => Self::too_long(prompt, capacity),
            EngineError::Sampling(SamplingError::Broken { .. }) | EngineError::Backend(BackendError::Failed { .. }) => {
                Self::failed(message)
            }
            _ => Self::bad(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
