//! Tokens to statements: Jinja2's grammar.

mod expressions;

use std::sync::Arc;

use crate::Settings;
use crate::ast::{Expr, ExprKind, For, Macro, Name, Statement, Target};
use crate::error::{Error, ErrorKind, Result};
use crate::lexer::{Token, tokens};

/// Expressions and statements within each other at most; bounds the stack. Python's own parser ends earlier.
const MAX_DEPTH: usize = 90;

pub fn parse(source: &str, settings: Settings) -> Result<Vec<Statement>> {
    let tokens = tokens(source, settings)?;
    let mut parser = Parser { tokens, at: 0, depth: 0, settings, loops: 0, branches: 0, uses: Vec::new() };
    parser.body(&[])
}

struct Parser {
    tokens: Vec<(Token, u32)>,
    at: usize,
    depth: usize,
    settings: Settings,
    /// `for` around the place, since the last macro.
    loops: usize,
    /// Conditions around the place: unknown filters and tests are no error there until they are reached.
    branches: usize,
    /// For each macro around the place: which of `varargs`, `kwargs`, `caller` its body reads.
    uses: Vec<[bool; 3]>,
}

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.at.min(self.tokens.len() - 1)].0
    }

    fn ahead(&self) -> &Token {
        &self.tokens[(self.at + 1).min(self.tokens.len() - 1)].0
    }

    fn line(&self) -> u32 {
        self.tokens[self.at.min(self.tokens.len() - 1)].1
    }

    fn next(&mut self) -> Token {
        let token = self.peek().clone();
        self.at += 1;
        token
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::new(ErrorKind::Syntax, message).at(self.line()))
    }

    fn found(&self) -> String {
        match self.peek() {
            Token::Text(_) => "template text".into(),
            Token::BlockBegin => "'{%'".into(),
            Token::BlockEnd => "end of statement block".into(),
            Token::PrintBegin => "'{{'".into(),
            Token::PrintEnd => "end of print statement".into(),
            Token::Name(name) => format!("'{name}'"),
            Token::String(text) => format!("{text:?}"),
            Token::Int(n) => format!("'{n}'"),
            Token::Float(n) => format!("'{n}'"),
            Token::Operator(o) => format!("'{o}'"),
            Token::End => "end of template".into(),
        }
    }

    fn is_operator(&self, operator: &str) -> bool {
        matches!(self.peek(), Token::Operator(o) if *o == operator)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.peek(), Token::Name(n) if &**n == name)
    }

    fn skip_operator(&mut self, operator: &str) -> bool {
        let here = self.is_operator(operator);
        self.at += usize::from(here);
        here
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let here = self.is_name(name);
        self.at += usize::from(here);
        here
    }

    fn expect(&mut self, operator: &str) -> Result<()> {
        if self.skip_operator(operator) {
            return Ok(());
        }
        self.fail(format!("expected '{operator}', got {}", self.found()))
    }

    fn expect_word(&mut self, word: &str) -> Result<()> {
        if self.skip_name(word) {
            return Ok(());
        }
        self.fail(format!("expected '{word}', got {}", self.found()))
    }

    fn name(&mut self) -> Result<Name> {
        match self.next() {
            Token::Name(name) => Ok(name),
            _ => {
                self.at -= 1;
                self.fail(format!("expected a name, got {}", self.found()))
            }
        }
    }

    fn deeper<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth >= MAX_DEPTH {
            return Err(Error::new(ErrorKind::Syntax, "nested too deeply").at(self.line()));
        }
        self.depth += 1;
        let read = read(self);
        self.depth -= 1;
        read
    }

    /// Statements up to a tag named in `ends`, which is left; up to the end where there are none.
    fn body(&mut self, ends: &[&str]) -> Result<Vec<Statement>> {
        let mut out = Vec::new();
        loop {
            match self.peek() {
                Token::Text(text) => {
                    out.push(Statement::Text(text.clone()));
                    self.at += 1;
                }
                Token::PrintBegin => {
                    self.at += 1;
                    out.push(Statement::Print(vec![self.tuple(true, &[], false)?]));
                    if self.next() != Token::PrintEnd {
                        self.at -= 1;
                        return self.fail(format!("expected end of print statement, got {}", self.found()));
                    }
                }
                Token::BlockBegin => {
                    self.at += 1;
                    if matches!(self.peek(), Token::Name(name) if ends.contains(&&**name)) {
                        return Ok(out);
                    }
                    out.push(self.deeper(|p| p.statement(ends))?);
                    self.block_end()?;
                }
                Token::End if ends.is_empty() => return Ok(out),
                _ => return self.fail(format!("unexpected {}; looking for {}", self.found(), ends.join(" or "))),
            }
        }
    }

    /// The rest of an opening tag, its body, and its end tag but for `%}`.
    fn block(&mut self, end: &str) -> Result<Vec<Statement>> {
        let body = self.block_until(&[end])?;
        self.at += 1;
        Ok(body)
    }

    fn block_until(&mut self, ends: &[&str]) -> Result<Vec<Statement>> {
        self.skip_operator(":");
        self.block_end()?;
        self.body(ends)
    }

    fn block_end(&mut self) -> Result<()> {
        if *self.peek() == Token::BlockEnd {
            self.at += 1;
            return Ok(());
        }
        self.fail(format!("expected end of statement block, got {}", self.found()))
    }

    fn statement(&mut self, ends: &[&str]) -> Result<Statement> {
        let line = self.line();
        let tag = self.name()?;
        match &*tag {
            "set" => self.set(),
            "for" => self.for_loop(line),
            "if" => self.condition(),
            "macro" => {
                let name = self.name()?;
                let (parameters, defaults) = self.signature()?;
                Ok(Statement::Macro(self.macro_body(name, parameters, defaults, "endmacro")?))
            }
            "call" => {
                let (parameters, defaults) =
                    if self.is_operator("(") { self.signature()? } else { (Vec::new(), Vec::new()) };
                let call = self.expression()?;
                if !matches!(call.kind, ExprKind::Call(..)) {
                    return self.fail("expected call");
                }
                let body = self.macro_body("caller".into(), parameters, defaults, "endcall")?;
                Ok(Statement::Call(call, body))
            }
            "filter" => {
                let body = Expr { kind: ExprKind::Body, line };
                let filter = self.filter_chain(body, true)?;
                Ok(Statement::Filter(filter, self.block("endfilter")?))
            }
            "with" => {
                let mut values = Vec::new();
                while *self.peek() != Token::BlockEnd {
                    if !values.is_empty() {
                        self.expect(",")?;
                    }
                    let target = self.target(&[], false)?;
                    self.expect("=")?;
                    values.push((target, self.expression()?));
                }
                Ok(Statement::With(values, self.block("endwith")?))
            }
            "block" => {
                let name = self.name()?;
                let scoped = self.skip_name("scoped");
                self.skip_name("required");
                let body = self.block("endblock")?;
                self.skip_name(&name);
                Ok(Statement::Block(scoped, body))
            }
            "print" => {
                let mut values = Vec::new();
                while *self.peek() != Token::BlockEnd {
                    if !values.is_empty() {
                        self.expect(",")?;
                    }
                    values.push(self.expression()?);
                }
                Ok(Statement::Print(values))
            }
            "generation" if self.settings.generation_tags => Ok(Statement::Scope(self.block("endgeneration")?)),
            "break" | "continue" if self.settings.loop_controls => {
                if self.loops == 0 {
                    return self.fail(format!("'{tag}' outside loop"));
                }
                Ok(if &*tag == "break" { Statement::Break } else { Statement::Continue })
            }
            "include" | "import" | "from" | "extends" => {
                let what = match &*tag {
                    "include" => "include",
                    "extends" => "extends",
                    _ => "import",
                };
                while !matches!(self.peek(), Token::BlockEnd | Token::End) {
                    self.at += 1;
                }
                Ok(Statement::Foreign(what, line))
            }
            "autoescape" => Err(Error::unsupported("the tag 'autoescape' is not supported").at(line)),
            _ => {
                let looking =
                    if ends.is_empty() { String::new() } else { format!("; looking for {}", ends.join(" or ")) };
                Err(Error::new(ErrorKind::Syntax, format!("unknown tag '{tag}'{looking}")).at(line))
            }
        }
    }

    fn set(&mut self) -> Result<Statement> {
        let target = self.target(&[], true)?;
        if self.skip_operator("=") {
            return Ok(Statement::Set(target, self.tuple(true, &[], false)?));
        }
        let line = self.line();
        let filter = if self.is_operator("|") {
            Some(self.filter_chain(Expr { kind: ExprKind::Body, line }, false)?)
        } else {
            None
        };
        Ok(Statement::SetBlock(target, filter, self.block("endset")?))
    }

    fn for_loop(&mut self, line: u32) -> Result<Statement> {
        let target = self.target(&["in"], false)?;
        self.expect_word("in")?;
        let iter = self.tuple(false, &["recursive"], false)?;
        let test = if self.skip_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.skip_name("recursive");
        self.loops += 1;
        let body = self.block_until(&["endfor", "else"]);
        self.loops -= 1;
        let body = body?;
        let otherwise = if self.skip_name("else") {
            self.block("endfor")?
        } else {
            self.at += 1;
            Vec::new()
        };
        Ok(Statement::For(Arc::new(For { target, iter, test, recursive, body, otherwise, line })))
    }

    fn condition(&mut self) -> Result<Statement> {
        self.branches += 1;
        let read = (|| {
            let mut branches = Vec::new();
            loop {
                let test = self.tuple(false, &[], false)?;
                let body = self.block_until(&["elif", "else", "endif"])?;
                branches.push((test, body));
                if self.skip_name("elif") {
                    continue;
                }
                if self.skip_name("else") {
                    return Ok(Statement::If(branches, self.block("endif")?));
                }
                self.at += 1;
                return Ok(Statement::If(branches, Vec::new()));
            }
        })();
        self.branches -= 1;
        read
    }

    fn signature(&mut self) -> Result<(Vec<Name>, Vec<Expr>)> {
        let (mut parameters, mut defaults) = (Vec::new(), Vec::new());
        self.expect("(")?;
        while !self.is_operator(")") {
            if !parameters.is_empty() {
                self.expect(",")?;
            }
            parameters.push(self.name()?);
            if self.skip_operator("=") {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                return self.fail("non-default argument follows default argument");
            }
        }
        self.expect(")")?;
        Ok((parameters, defaults))
    }

    fn macro_body(&mut self, name: Name, parameters: Vec<Name>, defaults: Vec<Expr>, end: &str) -> Result<Arc<Macro>> {
        self.uses.push([false; 3]);
        let loops = std::mem::take(&mut self.loops);
        let body = self.block(end);
        self.loops = loops;
        let [varargs, kwargs, caller] = self.uses.pop().unwrap_or_default();
        // As Jinja2, which looks for the names in the whole body: what an inner macro reads, this one is taken to read.
        if let Some(outer) = self.uses.last_mut() {
            *outer = [outer[0] | varargs, outer[1] | kwargs, outer[2] | caller];
        }
        let is_parameter = |n: &str| parameters.iter().any(|p| &**p == n);
        Ok(Arc::new(Macro {
            catches_varargs: varargs && !is_parameter("varargs"),
            catches_kwargs: kwargs && !is_parameter("kwargs"),
            uses_caller: caller || is_parameter("caller"),
            name,
            parameters,
            defaults,
            body: body?,
        }))
    }

    /// What is assigned to: a name, names with commas, `namespace.attribute` where that is allowed.
    fn target(&mut self, ends: &[&str], attributes: bool) -> Result<Target> {
        let mut targets = Vec::new();
        let mut comma = false;
        loop {
            let ends_here = matches!(self.peek(), Token::Name(n) if ends.contains(&&**n))
                || matches!(self.peek(), Token::BlockEnd | Token::PrintEnd)
                || self.is_operator(")");
            if ends_here {
                break;
            }
            targets.push(self.single_target(attributes)?);
            if !self.skip_operator(",") {
                break;
            }
            comma = true;
        }
        match (targets.len(), comma) {
            (0, _) => self.fail(format!("expected a name, got {}", self.found())),
            (1, false) => Ok(targets.remove(0)),
            _ => Ok(Target::Tuple(targets)),
        }
    }

    fn single_target(&mut self, attributes: bool) -> Result<Target> {
        if self.skip_operator("(") {
            let target = self.deeper(|p| p.target(&[], attributes))?;
            self.expect(")")?;
            return Ok(target);
        }
        let name = self.name()?;
        if matches!(&*name, "true" | "false" | "none" | "True" | "False" | "None") {
            return self.fail("can't assign to 'const'");
        }
        if attributes && self.skip_operator(".") {
            return Ok(Target::Attribute(name, self.name()?));
        }
        Ok(Target::Name(name))
    }
}
