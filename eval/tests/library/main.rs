//! What the evaluator gives and what it refuses: tasks, data, and servers that misbehave.

mod http;
mod ifeval;
mod openai;
mod records;
mod support;
mod tasks_errors;
mod tasks_golden;
