//! Renders a parsed template: scopes, statements, expressions, calls.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use serde_json::{Map, Value as Json};

use crate::ast::{Arguments as ArgumentExprs, Const, Expr, ExprKind, For, Macro, Name, Statement, Target};
use crate::error::{Error, ErrorKind, Result};
use crate::value::{Dict, Loop, MacroValue, Text, Value, insert};
use crate::{Options, Settings, attributes, filters, functions, methods, operators, tests};

/// Macros and recursive loops within each other at most.
const MAX_CALLS: usize = 150;

/// Variables, and the scope around them.
#[derive(Debug, Default)]
pub struct Scope {
    variables: RefCell<HashMap<Name, Value>>,
    parent: Option<Rc<Scope>>,
}

impl Scope {
    fn inside(parent: &Rc<Scope>) -> Rc<Self> {
        Rc::new(Self { variables: RefCell::default(), parent: Some(parent.clone()) })
    }

    fn get(&self, name: &str) -> Option<Value> {
        let mut scope = self;
        loop {
            if let Some(value) = scope.variables.borrow().get(name) {
                return Some(value.clone());
            }
            scope = scope.parent.as_deref()?;
        }
    }

    fn set(&self, name: &Name, value: Value) {
        self.variables.borrow_mut().insert(name.clone(), value);
    }
}

/// What a call passes.
#[derive(Clone, Debug, Default)]
pub struct Arguments {
    pub positional: Vec<Value>,
    pub named: Vec<(Name, Value)>,
}

impl Arguments {
    /// The arguments by the parameters' names, as a Python function takes them.
    ///
    /// # Errors
    /// Too many, unknown, or given twice.
    pub fn bind<const N: usize>(self, what: &str, names: [&str; N]) -> Result<[Option<Value>; N]> {
        let given = self.positional.len();
        if given > N {
            return Err(Error::failed(format!("{what}: takes {N} argument(s) at most, {given} given")));
        }
        let mut out: [Option<Value>; N] = [const { None }; N];
        for (slot, value) in out.iter_mut().zip(self.positional) {
            *slot = Some(value);
        }
        for (name, value) in self.named {
            let Some(at) = names.iter().position(|n| **n == *name) else {
                return Err(Error::failed(format!("{what}: got an unexpected keyword argument '{name}'")));
            };
            if out[at].replace(value).is_some() {
                return Err(Error::failed(format!("{what}: got multiple values for argument '{name}'")));
            }
        }
        Ok(out)
    }

    /// No arguments at all.
    pub fn none(self, what: &str) -> Result<()> {
        self.bind::<0>(what, []).map(drop)
    }

    /// One argument that must be there.
    pub fn one(self, what: &str, name: &str) -> Result<Value> {
        let [value] = self.bind(what, [name])?;
        value.ok_or_else(|| Error::failed(format!("{what}: missing the argument '{name}'")))
    }
}

/// How a statement ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    On,
    Break,
    Continue,
}

pub struct Renderer<'a> {
    pub settings: Settings,
    pub options: &'a Options<'a>,
    steps: u64,
    calls: usize,
    root: Rc<Scope>,
    /// Scopes that macros keep, which keep the macros: emptied at the end.
    kept: Vec<Rc<Scope>>,
    /// Texts of the blocks that filters are applied to.
    bodies: Vec<Value>,
}

impl Drop for Renderer<'_> {
    fn drop(&mut self) {
        for scope in &self.kept {
            let variables = scope.variables.take();
            drop(variables);
        }
    }
}

pub fn render(
    body: &[Statement],
    settings: Settings,
    context: &Map<String, Json>,
    options: &Options,
) -> Result<String> {
    let given = Scope::default();
    for (name, value) in context {
        given.set(&name.as_str().into(), Value::from_json(value));
    }
    let root = Scope::inside(&Rc::new(given));
    let mut renderer = Renderer {
        settings,
        options,
        steps: options.steps,
        calls: 0,
        root: root.clone(),
        kept: vec![],
        bodies: vec![],
    };
    let mut out = String::new();
    renderer.run(body, &root, &mut out)?;
    Ok(out)
}

impl Renderer<'_> {
    /// Counts work.
    pub fn charge(&mut self, steps: usize) -> Result<()> {
        match self.steps.checked_sub(steps as u64) {
            Some(left) => {
                self.steps = left;
                Ok(())
            }
            None => Err(Error::new(ErrorKind::Limit, format!("{} steps", self.options.steps))),
        }
    }

    /// Counts a text that is to be made.
    pub fn charge_bytes(&mut self, bytes: usize) -> Result<()> {
        if bytes > self.options.max_text {
            return Err(Error::new(ErrorKind::Limit, format!("{} bytes of text", self.options.max_text)));
        }
        self.charge(bytes / 64)
    }

    pub fn undefined(&self, message: impl Into<String>) -> Value {
        Value::undefined(self.settings.strict_undefined, message)
    }

    fn write(&mut self, out: &mut String, text: &str) -> Result<()> {
        if out.len() + text.len() > self.options.max_text {
            return Err(Error::new(ErrorKind::Limit, format!("{} bytes of text", self.options.max_text)));
        }
        out.push_str(text);
        Ok(())
    }

    fn run(&mut self, body: &[Statement], scope: &Rc<Scope>, out: &mut String) -> Result<Flow> {
        for statement in body {
            self.charge(1)?;
            let flow = self.statement(statement, scope, out)?;
            if flow != Flow::On {
                return Ok(flow);
            }
        }
        Ok(Flow::On)
    }

    /// The text that statements make.
    fn text(&mut self, body: &[Statement], scope: &Rc<Scope>) -> Result<(String, Flow)> {
        let mut out = String::new();
        let flow = self.run(body, scope, &mut out)?;
        self.charge_bytes(out.len())?;
        Ok((out, flow))
    }

    fn filtered(&mut self, text: String, filter: &Expr, scope: &Rc<Scope>) -> Result<Value> {
        self.bodies.push(text.into());
        let value = self.eval(filter, scope);
        self.bodies.pop();
        value
    }

    fn statement(&mut self, statement: &Statement, scope: &Rc<Scope>, out: &mut String) -> Result<Flow> {
        match statement {
            Statement::Text(text) => self.write(out, text)?,
            Statement::Print(values) => {
                for expr in values {
                    let text = self.eval(expr, scope)?.str().map_err(|e| e.at(expr.line))?;
                    self.write(out, &text)?;
                }
            }
            Statement::Set(target, expr) => {
                let value = self.eval(expr, scope)?;
                self.assign(target, value, scope).map_err(|e| e.at(expr.line))?;
            }
            Statement::SetBlock(target, filter, body) => {
                let (text, flow) = self.text(body, &Scope::inside(scope))?;
                if flow != Flow::On {
                    return Ok(flow);
                }
                let value = match filter {
                    Some(filter) => self.filtered(text, filter, scope)?,
                    None => text.into(),
                };
                self.assign(target, value, scope)?;
            }
            Statement::If(branches, otherwise) => {
                for (test, body) in branches {
                    if self.eval(test, scope)?.truth().map_err(|e| e.at(test.line))? {
                        return self.run(body, scope, out);
                    }
                }
                return self.run(otherwise, scope, out);
            }
            Statement::For(definition) => {
                let iterable = self.eval(&definition.iter, scope)?;
                self.for_loop(definition, iterable, scope, 0, out).map_err(|e| e.at(definition.line))?;
            }
            Statement::Macro(definition) => {
                let value = self.closure(definition, scope);
                scope.set(&definition.name, value);
            }
            Statement::Call(call, body) => {
                let ExprKind::Call(callee, arguments) = &call.kind else { return Ok(Flow::On) };
                let callee = self.eval(callee, scope)?;
                let mut arguments = self.arguments(arguments, scope)?;
                arguments.named.push(("caller".into(), self.closure(body, scope)));
                let text = self.call(&callee, arguments).and_then(|v| v.str()).map_err(|e| e.at(call.line))?;
                self.write(out, &text)?;
            }
            Statement::Filter(filter, body) => {
                let (text, flow) = self.text(body, &Scope::inside(scope))?;
                if flow != Flow::On {
                    return Ok(flow);
                }
                let text = self.filtered(text, filter, scope)?.str()?;
                self.write(out, &text)?;
            }
            Statement::With(values, body) => {
                let inner = Scope::inside(scope);
                for (target, expr) in values {
                    let value = self.eval(expr, scope)?;
                    self.assign(target, value, &inner).map_err(|e| e.at(expr.line))?;
                }
                return self.run(body, &inner, out);
            }
            Statement::Block(scoped, body) => {
                let around = if *scoped { scope.clone() } else { self.root.clone() };
                self.run(body, &Scope::inside(&around), out)?;
            }
            Statement::Scope(body) => return self.run(body, &Scope::inside(scope), out),
            Statement::Foreign(what, line) => {
                let message = format!("{{% {what} %}}: there are no other templates");
                return Err(Error::failed(message).at(*line));
            }
            Statement::Break => return Ok(Flow::Break),
            Statement::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::On)
    }

    fn closure(&mut self, definition: &Arc<Macro>, scope: &Rc<Scope>) -> Value {
        if !self.kept.iter().any(|kept| Rc::ptr_eq(kept, scope)) {
            self.kept.push(scope.clone());
        }
        Value::Macro(Rc::new(MacroValue { definition: definition.clone(), scope: scope.clone() }))
    }

    fn assign(&mut self, target: &Target, value: Value, scope: &Rc<Scope>) -> Result<()> {
        match target {
            Target::Name(name) => scope.set(name, value),
            Target::Attribute(namespace, attribute) => {
                let found = scope.get(namespace);
                let Some(Value::Namespace(dict)) = found else {
                    return Err(Error::failed("cannot assign attribute on non-namespace object"));
                };
                functions::check_attribute(self, attribute)?;
                insert(&mut dict.borrow_mut(), (&**attribute).into(), value)?;
            }
            Target::Tuple(targets) => {
                let values = value.iterate().map_err(|e| match e.kind {
                    ErrorKind::Failed => {
                        Error::failed(format!("cannot unpack non-iterable {} object", value.type_name()))
                    }
                    _ => e,
                })?;
                if values.len() != targets.len() {
                    let (found, wanted) = (values.len(), targets.len());
                    let what = if found < wanted { "not enough" } else { "too many" };
                    return Err(Error::failed(format!("{what} values to unpack (expected {wanted}, got {found})")));
                }
                for (target, value) in targets.iter().zip(values) {
                    self.assign(target, value, scope)?;
                }
            }
        }
        Ok(())
    }

    fn for_loop(
        &mut self,
        definition: &Arc<For>,
        iterable: Value,
        scope: &Rc<Scope>,
        depth: usize,
        out: &mut String,
    ) -> Result<()> {
        let mut items = iterable.iterate()?;
        self.charge(items.len() / 16)?;
        if let Some(test) = &definition.test {
            let mut kept = Vec::new();
            for item in items {
                let inner = Scope::inside(scope);
                self.assign(&definition.target, item.clone(), &inner)?;
                if self.eval(test, &inner)?.truth()? {
                    kept.push(item);
                }
            }
            items = kept;
        }
        if items.is_empty() {
            self.run(&definition.otherwise, &Scope::inside(scope), out)?;
            return Ok(());
        }
        let recursion = definition.recursive.then(|| (definition.clone(), scope.clone()));
        let count = items.len();
        let state = Rc::new(Loop { items, index: 0.into(), depth, last: RefCell::new(None), recursion });
        let name: Name = "loop".into();
        for index in 0..count {
            self.charge(1)?;
            state.index.set(index);
            let inner = Scope::inside(scope);
            inner.set(&name, Value::Loop(state.clone()));
            self.assign(&definition.target, state.items[index].clone(), &inner)?;
            if self.run(&definition.body, &inner, out)? == Flow::Break {
                break;
            }
        }
        Ok(())
    }

    /// The arguments of a call, in their order.
    fn arguments(&mut self, arguments: &ArgumentExprs, scope: &Rc<Scope>) -> Result<Arguments> {
        let mut out = Arguments::default();
        for expr in &arguments.positional {
            out.positional.push(self.eval(expr, scope)?);
        }
        for (name, expr) in &arguments.named {
            out.named.push((name.clone(), self.eval(expr, scope)?));
        }
        if let Some(rest) = &arguments.rest {
            out.positional.extend(self.eval(rest, scope)?.iterate()?);
        }
        if let Some(rest) = &arguments.named_rest {
            let value = self.eval(rest, scope)?;
            let Value::Dict(dict) = &value else {
                return Err(Error::failed(format!("argument after ** must be a mapping, not {}", value.type_name())));
            };
            for (key, value) in dict.borrow().values() {
                let name = key.as_text().ok_or_else(|| Error::failed("keywords must be strings"))?;
                if out.named.iter().any(|(n, _)| &**n == name) {
                    return Err(Error::failed(format!("got multiple values for keyword argument '{name}'")));
                }
                out.named.push((name.into(), value.clone()));
            }
        }
        Ok(out)
    }

    fn name(&mut self, name: &str) -> Result<Value> {
        if functions::exists(name, self.settings) {
            let known = functions::NAMES.iter().find(|n| **n == name);
            return Ok(Value::Function(known.copied().unwrap_or("function")));
        }
        if name == "self" || name == "super" {
            return Err(Error::unsupported(format!("'{name}' is not supported")));
        }
        Ok(self.undefined(format!("'{name}' is undefined")))
    }

    pub fn eval(&mut self, expr: &Expr, scope: &Rc<Scope>) -> Result<Value> {
        self.charge(1)?;
        self.value(expr, scope).map_err(|e| e.at(expr.line))
    }

    fn all(&mut self, exprs: &[Expr], scope: &Rc<Scope>) -> Result<Vec<Value>> {
        exprs.iter().map(|e| self.eval(e, scope)).collect()
    }

    fn truth(&mut self, expr: &Expr, scope: &Rc<Scope>) -> Result<bool> {
        self.eval(expr, scope)?.truth()
    }

    fn value(&mut self, expr: &Expr, scope: &Rc<Scope>) -> Result<Value> {
        Ok(match &expr.kind {
            ExprKind::Const(constant) => match constant {
                Const::None => Value::None,
                Const::Bool(b) => Value::Bool(*b),
                Const::Int(n) => Value::Int(*n),
                Const::Float(x) => Value::Float(*x),
                Const::Text(text) => Value::Text(Text { text: text.clone(), markup: false }),
            },
            ExprKind::Name(name) => match scope.get(name) {
                Some(value) => value,
                None => self.name(name)?,
            },
            ExprKind::List(items) => Value::list(self.all(items, scope)?),
            ExprKind::Tuple(items) => Value::tuple(self.all(items, scope)?),
            ExprKind::Dict(items) => {
                let mut dict = Dict::new();
                for (key, value) in items {
                    let key = self.eval(key, scope)?;
                    insert(&mut dict, key, self.eval(value, scope)?)?;
                }
                Value::Dict(Rc::new(RefCell::new(dict)))
            }
            ExprKind::Attribute(value, name) => {
                let value = self.eval(value, scope)?;
                self.attribute(&value, name)?
            }
            ExprKind::Item(value, index) => {
                let constant = matches!(value.kind, ExprKind::Const(_));
                let value = self.eval(value, scope)?;
                // Jinja2 computes what is constant by another way, on which a wrong type gives an undefined value.
                let plain = !constant || matches!(value, Value::Text(_));
                if let (ExprKind::Slice(parts), true) = (&index.kind, plain) {
                    let parts = self.slice_parts(parts, scope)?;
                    return operators::slice(self, &value, &parts);
                }
                let index = self.eval(index, scope)?;
                self.item(&value, &index)?
            }
            ExprKind::Slice(parts) => Value::Slice(Rc::new(self.slice_parts(parts, scope)?)),
            ExprKind::Call(callee, arguments) => {
                let callee = self.eval(callee, scope)?;
                let arguments = self.arguments(arguments, scope)?;
                self.call(&callee, arguments)?
            }
            ExprKind::Filter(value, name, arguments) => {
                let value = self.eval(value, scope)?;
                let arguments = self.arguments(arguments, scope)?;
                filters::call(self, name, value, arguments)?
            }
            ExprKind::Test(value, name, arguments) => {
                let value = self.eval(value, scope)?;
                let arguments = self.arguments(arguments, scope)?;
                Value::Bool(tests::call(self, name, &value, arguments)?)
            }
            ExprKind::Body => self.bodies.last().cloned().unwrap_or(Value::None),
            ExprKind::Not(inner) => Value::Bool(!self.truth(inner, scope)?),
            ExprKind::Negative(inner) => operators::signed(&self.eval(inner, scope)?, true)?,
            ExprKind::Positive(inner) => operators::signed(&self.eval(inner, scope)?, false)?,
            ExprKind::Binary(operator, left, right) => {
                let left = self.eval(left, scope)?;
                let right = self.eval(right, scope)?;
                operators::binary(self, *operator, &left, &right)?
            }
            ExprKind::And(left, right) => {
                let left = self.eval(left, scope)?;
                if left.truth()? { self.eval(right, scope)? } else { left }
            }
            ExprKind::Or(left, right) => {
                let left = self.eval(left, scope)?;
                if left.truth()? { left } else { self.eval(right, scope)? }
            }
            ExprKind::Concat(parts) => {
                let mut text = String::new();
                for part in parts {
                    text.push_str(&self.eval(part, scope)?.str()?);
                    self.charge_bytes(text.len())?;
                }
                text.into()
            }
            ExprKind::Compare(first, rest) => {
                let mut left = self.eval(first, scope)?;
                for (operator, right) in rest {
                    let right = self.eval(right, scope)?;
                    if !operators::compare(*operator, &left, &right)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Value::Bool(true)
            }
            ExprKind::Condition(test, then, otherwise) => {
                if self.truth(test, scope)? {
                    return self.eval(then, scope);
                }
                match otherwise {
                    Some(otherwise) => self.eval(otherwise, scope)?,
                    // Prints nothing even where undefined values are errors.
                    None => Value::undefined(
                        false,
                        format!(
                            "the inline if-expression on line {} evaluated to false and no else section was defined.",
                            expr.line
                        ),
                    ),
                }
            }
        })
    }

    fn slice_parts(&mut self, parts: &[Option<Expr>; 3], scope: &Rc<Scope>) -> Result<[Value; 3]> {
        let mut out = [Value::None, Value::None, Value::None];
        for (slot, part) in out.iter_mut().zip(parts) {
            if let Some(part) = part {
                *slot = self.eval(part, scope)?;
            }
        }
        Ok(out)
    }

    /// `value.name`: an attribute, else an item of that name.
    pub fn attribute(&mut self, value: &Value, name: &str) -> Result<Value> {
        value.check()?;
        if let Some(found) = attributes::of(self, value, name)? {
            return Ok(found);
        }
        if let Some(found) = operators::item(value, &name.into())? {
            return Ok(found);
        }
        attributes::missing(self, value, &name.into())
    }

    /// `value[index]`: an item, else an attribute of that name.
    pub fn item(&mut self, value: &Value, index: &Value) -> Result<Value> {
        if let Some(found) = operators::item(value, index)? {
            return Ok(found);
        }
        if let Some(name) = index.as_text()
            && let Some(found) = attributes::of(self, value, name)?
        {
            return Ok(found);
        }
        attributes::missing(self, value, index)
    }

    /// `callee(arguments)`
    pub fn call(&mut self, callee: &Value, arguments: Arguments) -> Result<Value> {
        callee.check()?;
        match callee {
            Value::Macro(own) => self.deeper(|r| r.call_macro(own, arguments)),
            Value::Function(name) => functions::call(self, name, arguments),
            Value::Method(method) => methods::call(self, &method.0, &method.1, arguments),
            Value::Joiner(joiner) => {
                arguments.none("joiner")?;
                Ok(if joiner.1.replace(true) { joiner.0.clone() } else { "".into() })
            }
            Value::Loop(state) => {
                let Some((definition, scope)) = state.recursion.clone() else {
                    return Err(Error::failed("The loop must have the 'recursive' marker to be called recursively."));
                };
                let iterable = arguments.one("loop", "iterable")?;
                let depth = state.depth + 1;
                self.deeper(|r| {
                    let mut out = String::new();
                    r.for_loop(&definition, iterable, &scope, depth, &mut out)?;
                    r.charge_bytes(out.len())?;
                    Ok(out.into())
                })
            }
            other => Err(Error::failed(format!("'{}' object is not callable", other.type_name()))),
        }
    }

    fn deeper<T>(&mut self, call: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.calls >= MAX_CALLS {
            return Err(Error::new(ErrorKind::Limit, format!("{MAX_CALLS} calls within each other")));
        }
        self.calls += 1;
        let result = call(self);
        self.calls -= 1;
        result
    }

    fn call_macro(&mut self, own: &MacroValue, arguments: Arguments) -> Result<Value> {
        let definition = &own.definition;
        let (name, parameters) = (&definition.name, &definition.parameters);
        let mut positional = arguments.positional.into_iter();
        let mut named = arguments.named;
        let scope = Scope::inside(&own.scope);
        let mut take = |wanted: &str| {
            let at = named.iter().position(|(n, _)| &**n == wanted)?;
            Some(named.remove(at).1)
        };
        let mut values: Vec<Option<Value>> = positional.by_ref().take(parameters.len()).map(Some).collect();
        for parameter in &parameters[values.len()..] {
            values.push(take(parameter));
        }
        if definition.uses_caller && !parameters.iter().any(|p| &**p == "caller") {
            let caller = take("caller").unwrap_or_else(|| self.undefined("No caller defined"));
            scope.set(&"caller".into(), caller);
        }
        let rest: Vec<Value> = positional.collect();
        if definition.catches_kwargs {
            let pairs = named.into_iter().map(|(name, value)| (Value::from(&*name), value));
            scope.set(&"kwargs".into(), Value::dict(pairs)?);
        } else if let Some((argument, _)) = named.first() {
            return Err(Error::failed(format!("macro '{name}' takes no keyword argument '{argument}'")));
        }
        if definition.catches_varargs {
            scope.set(&"varargs".into(), Value::tuple(rest));
        } else if !rest.is_empty() {
            let most = parameters.len();
            return Err(Error::failed(format!("macro '{name}' takes not more than {most} argument(s)")));
        }
        let first_default = parameters.len() - definition.defaults.len();
        for (at, (parameter, value)) in parameters.iter().zip(values).enumerate() {
            let value = match (value, at.checked_sub(first_default)) {
                (Some(value), _) => value,
                (None, Some(default)) => self.eval(&definition.defaults[default], &scope)?,
                (None, None) => self.undefined(format!("parameter '{parameter}' was not provided")),
            };
            scope.set(parameter, value);
        }
        let (text, _) = self.text(&definition.body, &scope)?;
        Ok(text.into())
    }
}
