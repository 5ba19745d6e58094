//! What the evaluator gives and what it refuses: tasks, data, and servers that misbehave.

mod http;
mod openai;
mod statistics;
mod support;
mod tasks_errors;
mod tasks_golden;
