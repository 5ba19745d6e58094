//! Tokens to expressions: Jinja2's grammar, its precedences included.

use super::super::ast::{Arguments, Binary, Comparison, Const, Expr, ExprKind, Name};
use super::super::error::{Error, ErrorKind, Result};
use super::super::lexer::Token;
use super::super::{filters, tests};
use super::Parser;

/// Operators of one kind in a row, whose tree is as deep.
const MAX_CHAIN: usize = 400;

impl Parser {
    /// One expression, or several with commas: a tuple.
    pub(super) fn tuple(&mut self, conditions: bool, ends: &[&str], parentheses: bool) -> Result<Expr> {
        let line = self.line();
        let (mut items, mut comma) = (Vec::new(), false);
        loop {
            let ends_here = matches!(self.peek(), Token::PrintEnd | Token::BlockEnd)
                || self.is_operator(")")
                || matches!(self.peek(), Token::Name(n) if ends.contains(&&**n));
            if ends_here {
                break;
            }
            items.push(if conditions { self.expression()? } else { self.deeper(Self::or)? });
            if !self.skip_operator(",") {
                break;
            }
            comma = true;
        }
        if !comma {
            if let Some(only) = items.pop() {
                return Ok(only);
            }
            if !parentheses {
                return self.fail(format!("Expected an expression, got {}", self.found()));
            }
        }
        Ok(Expr { kind: ExprKind::Tuple(items), line })
    }

    pub(super) fn expression(&mut self) -> Result<Expr> {
        self.deeper(Self::conditional)
    }

    fn conditional(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut value = self.or()?;
        let mut chain = 0;
        while self.is_name("if") {
            self.chained(&mut chain)?;
            self.at += 1;
            self.branches += 1;
            let read = (|| {
                let test = self.or()?;
                let otherwise = if self.skip_name("else") { Some(Box::new(self.expression()?)) } else { None };
                Ok((test, otherwise))
            })();
            self.branches -= 1;
            let (test, otherwise) = read?;
            value = Expr { kind: ExprKind::Condition(Box::new(test), Box::new(value), otherwise), line };
        }
        Ok(value)
    }

    fn chained(&self, count: &mut usize) -> Result<()> {
        *count += 1;
        if *count > MAX_CHAIN { self.fail("too many operators in a row") } else { Ok(()) }
    }

    fn or(&mut self) -> Result<Expr> {
        let line = self.line();
        let (mut left, mut chain) = (self.and()?, 0);
        while self.skip_name("or") {
            self.chained(&mut chain)?;
            let right = self.and()?;
            left = Expr { kind: ExprKind::Or(Box::new(left), Box::new(right)), line };
        }
        Ok(left)
    }

    fn and(&mut self) -> Result<Expr> {
        let line = self.line();
        let (mut left, mut chain) = (self.not()?, 0);
        while self.skip_name("and") {
            self.chained(&mut chain)?;
            let right = self.not()?;
            left = Expr { kind: ExprKind::And(Box::new(left), Box::new(right)), line };
        }
        Ok(left)
    }

    fn not(&mut self) -> Result<Expr> {
        let line = self.line();
        if self.skip_name("not") {
            let inner = self.deeper(Self::not)?;
            return Ok(Expr { kind: ExprKind::Not(Box::new(inner)), line });
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Expr> {
        let line = self.line();
        let first = self.sum()?;
        let mut rest = Vec::new();
        loop {
            let operator = match self.peek() {
                Token::Operator("==") => Comparison::Equal,
                Token::Operator("!=") => Comparison::NotEqual,
                Token::Operator("<") => Comparison::Less,
                Token::Operator("<=") => Comparison::LessEqual,
                Token::Operator(">") => Comparison::Greater,
                Token::Operator(">=") => Comparison::GreaterEqual,
                Token::Name(n) if &**n == "in" => Comparison::In,
                Token::Name(n) if &**n == "not" && matches!(self.ahead(), Token::Name(n) if &**n == "in") => {
                    self.at += 1;
                    Comparison::NotIn
                }
                _ => break,
            };
            self.at += 1;
            rest.push((operator, self.sum()?));
        }
        if rest.is_empty() {
            return Ok(first);
        }
        Ok(Expr { kind: ExprKind::Compare(Box::new(first), rest), line })
    }

    fn binary(&mut self, operators: &[(&str, Binary)], operand: impl Fn(&mut Self) -> Result<Expr>) -> Result<Expr> {
        let mut line = self.line();
        let (mut left, mut chain) = (operand(self)?, 0);
        while let Some((_, operator)) = operators.iter().find(|(o, _)| self.is_operator(o)) {
            self.chained(&mut chain)?;
            self.at += 1;
            let right = operand(self)?;
            left = Expr { kind: ExprKind::Binary(*operator, Box::new(left), Box::new(right)), line };
            line = self.line();
        }
        Ok(left)
    }

    fn sum(&mut self) -> Result<Expr> {
        self.binary(&[("+", Binary::Add), ("-", Binary::Sub)], Self::concat)
    }

    fn concat(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut parts = vec![self.product()?];
        while self.skip_operator("~") {
            parts.push(self.product()?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Expr { kind: ExprKind::Concat(parts), line } })
    }

    fn product(&mut self) -> Result<Expr> {
        let operators = [("*", Binary::Mul), ("/", Binary::Div), ("//", Binary::FloorDiv), ("%", Binary::Mod)];
        self.binary(&operators, |p| p.binary(&[("**", Binary::Pow)], |p| p.unary(true)))
    }

    fn unary(&mut self, filters: bool) -> Result<Expr> {
        let line = self.line();
        let value = if self.skip_operator("-") {
            ExprKind::Negative(Box::new(self.deeper(|p| p.unary(false))?))
        } else if self.skip_operator("+") {
            ExprKind::Positive(Box::new(self.deeper(|p| p.unary(false))?))
        } else {
            self.primary()?.kind
        };
        let mut value = self.postfix(Expr { kind: value, line })?;
        if filters {
            let mut chain = 0;
            loop {
                self.chained(&mut chain)?;
                if self.is_operator("|") {
                    value = self.one_filter(value)?;
                } else if self.is_name("is") {
                    value = self.test(value)?;
                } else if self.is_operator("(") {
                    value = self.call(value)?;
                } else {
                    break;
                }
            }
        }
        Ok(value)
    }

    fn primary(&mut self) -> Result<Expr> {
        let line = self.line();
        let kind = match self.next() {
            Token::Name(name) => match &*name {
                "true" | "True" => ExprKind::Const(Const::Bool(true)),
                "false" | "False" => ExprKind::Const(Const::Bool(false)),
                "none" | "None" => ExprKind::Const(Const::None),
                _ => {
                    let special = ["varargs", "kwargs", "caller"].iter().position(|s| **s == *name);
                    if let (Some(uses), Some(special)) = (self.uses.last_mut(), special) {
                        uses[special] = true;
                    }
                    ExprKind::Name(name)
                }
            },
            Token::String(mut text) => {
                while let Token::String(more) = self.peek() {
                    text.push_str(more);
                    self.at += 1;
                }
                ExprKind::Const(Const::Text(text.into()))
            }
            Token::Int(n) => ExprKind::Const(Const::Int(n)),
            Token::Float(n) => ExprKind::Const(Const::Float(n)),
            Token::Operator("(") => {
                let inner = self.deeper(|p| p.tuple(true, &[], true))?;
                self.expect(")")?;
                return Ok(inner);
            }
            Token::Operator("[") => {
                let mut items = Vec::new();
                while !self.is_operator("]") {
                    items.push(self.expression()?);
                    if !self.skip_operator(",") {
                        break;
                    }
                }
                self.expect("]")?;
                ExprKind::List(items)
            }
            Token::Operator("{") => {
                let mut items = Vec::new();
                while !self.is_operator("}") {
                    let key = self.expression()?;
                    self.expect(":")?;
                    items.push((key, self.expression()?));
                    if !self.skip_operator(",") {
                        break;
                    }
                }
                self.expect("}")?;
                ExprKind::Dict(items)
            }
            _ => {
                self.at -= 1;
                return self.fail(format!("unexpected {}", self.found()));
            }
        };
        Ok(Expr { kind, line })
    }

    fn postfix(&mut self, mut value: Expr) -> Result<Expr> {
        let mut chain = 0;
        loop {
            self.chained(&mut chain)?;
            let line = self.line();
            if self.skip_operator(".") {
                let kind = match self.next() {
                    Token::Name(name) => ExprKind::Attribute(Box::new(value), name),
                    Token::Int(n) => {
                        let index = Expr { kind: ExprKind::Const(Const::Int(n)), line };
                        ExprKind::Item(Box::new(value), Box::new(index))
                    }
                    _ => {
                        self.at -= 1;
                        return self.fail("expected name or number");
                    }
                };
                value = Expr { kind, line };
            } else if self.skip_operator("[") {
                let mut items = Vec::new();
                while !self.is_operator("]") {
                    if !items.is_empty() {
                        self.expect(",")?;
                    }
                    items.push(self.subscript()?);
                }
                self.expect("]")?;
                let index =
                    if items.len() == 1 { items.remove(0) } else { Expr { kind: ExprKind::Tuple(items), line } };
                value = Expr { kind: ExprKind::Item(Box::new(value), Box::new(index)), line };
            } else if self.is_operator("(") {
                value = self.call(value)?;
            } else {
                return Ok(value);
            }
        }
    }

    fn subscript(&mut self) -> Result<Expr> {
        let line = self.line();
        let mut parts = [None, None, None];
        if !self.is_operator(":") {
            let first = self.expression()?;
            if !self.is_operator(":") {
                return Ok(first);
            }
            parts[0] = Some(first);
        }
        self.expect(":")?;
        for (at, part) in parts.iter_mut().enumerate().skip(1) {
            if at == 2 && !self.skip_operator(":") {
                break;
            }
            if !self.is_operator(":") && !self.is_operator("]") && !self.is_operator(",") {
                *part = Some(self.expression()?);
            }
        }
        Ok(Expr { kind: ExprKind::Slice(Box::new(parts)), line })
    }

    fn call(&mut self, value: Expr) -> Result<Expr> {
        let line = self.line();
        let arguments = self.arguments()?;
        Ok(Expr { kind: ExprKind::Call(Box::new(value), arguments), line })
    }

    fn arguments(&mut self) -> Result<Arguments> {
        let mut out = Arguments::default();
        let wrong = "invalid syntax for function call expression";
        self.expect("(")?;
        while !self.is_operator(")") {
            if self.skip_operator("*") {
                if out.rest.is_some() || out.named_rest.is_some() {
                    return self.fail(wrong);
                }
                out.rest = Some(Box::new(self.expression()?));
            } else if self.skip_operator("**") {
                if out.named_rest.is_some() {
                    return self.fail(wrong);
                }
                out.named_rest = Some(Box::new(self.expression()?));
            } else if matches!(self.peek(), Token::Name(_)) && matches!(self.ahead(), Token::Operator("=")) {
                if out.named_rest.is_some() {
                    return self.fail(wrong);
                }
                let name = self.name()?;
                self.at += 1;
                out.named.push((name, self.expression()?));
            } else {
                if out.rest.is_some() || out.named_rest.is_some() || !out.named.is_empty() {
                    return self.fail(wrong);
                }
                out.positional.push(self.expression()?);
            }
            if !self.skip_operator(",") {
                break;
            }
        }
        self.expect(")")?;
        Ok(out)
    }

    fn dotted_name(&mut self) -> Result<Name> {
        let mut name = self.name()?;
        while self.skip_operator(".") {
            name = format!("{name}.{}", self.name()?).into();
        }
        Ok(name)
    }

    /// Filters after each other; `inline`: the first has no `|` before it.
    pub(super) fn filter_chain(&mut self, mut value: Expr, inline: bool) -> Result<Expr> {
        if inline {
            value = self.filter_named(value)?;
        }
        let mut chain = 0;
        while self.is_operator("|") {
            self.chained(&mut chain)?;
            value = self.one_filter(value)?;
        }
        Ok(value)
    }

    fn one_filter(&mut self, value: Expr) -> Result<Expr> {
        self.expect("|")?;
        self.filter_named(value)
    }

    fn filter_named(&mut self, value: Expr) -> Result<Expr> {
        let line = self.line();
        let name = self.dotted_name()?;
        let arguments = if self.is_operator("(") { self.arguments()? } else { Arguments::default() };
        if self.branches == 0 && !filters::exists(&name, self.settings) {
            return Err(Error::new(ErrorKind::Syntax, format!("No filter named '{name}'.")).at(line));
        }
        Ok(Expr { kind: ExprKind::Filter(Box::new(value), name, arguments), line })
    }

    fn test(&mut self, value: Expr) -> Result<Expr> {
        let line = self.line();
        self.at += 1;
        let negated = self.skip_name("not");
        let name = self.dotted_name()?;
        let starts = match self.peek() {
            Token::Name(n) => !matches!(&**n, "else" | "or" | "and"),
            Token::String(_) | Token::Int(_) | Token::Float(_) | Token::Operator("[" | "{") => true,
            _ => false,
        };
        let arguments = if self.is_operator("(") {
            self.arguments()?
        } else if starts {
            if self.is_name("is") {
                return self.fail("You cannot chain multiple tests with is");
            }
            let argument = self.primary()?;
            let argument = self.postfix(argument)?;
            Arguments { positional: vec![argument], ..Arguments::default() }
        } else {
            Arguments::default()
        };
        if self.branches == 0 && !tests::exists(&name) {
            return Err(Error::new(ErrorKind::Syntax, format!("No test named '{name}'.")).at(line));
        }
        let test = Expr { kind: ExprKind::Test(Box::new(value), name, arguments), line };
        Ok(if negated { Expr { kind: ExprKind::Not(Box::new(test)), line } } else { test })
    }
}
