//! Imports GGUF files that the tests write themselves, whole and damaged, and compares the folders that come out.
//!
//! Tests on real files run where environment variables name them, and say so where not:
//! RECOUP_SHARED (the folder with data/), RECOUP_SMOLLM2_GGUF (SmolLM2-135M-Instruct.Q4_1.gguf), RECOUP_SMOLLM2_BF16
//! (a folder converted from it by other tools), RECOUP_LLAMA3_TOKENIZER and RECOUP_DEEPSEEK_V3_TOKENIZER
//! (tokenizer.json of these models).

mod blocks;
mod hostile;
mod models;
mod tokenizers;
