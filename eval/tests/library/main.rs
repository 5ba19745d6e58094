//! What the evaluator gives and what it refuses: tasks, data and statistics.

mod statistics;
mod tasks_errors;
mod tasks_golden;
