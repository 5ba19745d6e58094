//! Python's values as templates meet them: what they are called, whether they are true, how they print, which are equal.

use std::cell::{Cell, RefCell};
use std::cmp::Ordering;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use indexmap::IndexMap;

use crate::ast::{For, Macro, Name};
use crate::error::{Error, ErrorKind, Result};
use crate::python::{float, quoted};
use crate::render::Scope;

/// Lists within each other at most where something walks over them; Python's own limit is about as far.
pub const MAX_NESTING: usize = 400;

#[derive(Clone, Debug)]
pub enum Value {
    Undefined(Rc<Undefined>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Text),
    List(Rc<RefCell<Vec<Value>>>),
    Tuple(Rc<Vec<Value>>),
    /// `groupby`'s pairs: a tuple of which the two also have names.
    Group(Rc<Vec<Value>>),
    Dict(Rc<RefCell<Dict>>),
    /// `keys()`, `values()` or `items()` of a dict, whose changes they show.
    View(View, Rc<RefCell<Dict>>),
    /// Start, stop, step.
    Range(i128, i128, i128),
    /// What can be walked over once.
    Iterator(Rc<RefCell<Once>>),
    Namespace(Rc<RefCell<Dict>>),
    Slice(Rc<[Value; 3]>),
    Loop(Rc<Loop>),
    Cycler(Rc<(Vec<Value>, Cell<usize>)>),
    Joiner(Rc<(Value, Cell<bool>)>),
    Macro(Rc<MacroValue>),
    /// A method and what it belongs to.
    Method(Rc<(Value, Name)>),
    Function(&'static str),
}

/// `str`, or `Markup`: text that has its HTML escaped already.
#[derive(Clone, Debug)]
pub struct Text {
    pub text: Arc<str>,
    pub markup: bool,
}

#[derive(Debug)]
pub struct Undefined {
    pub message: String,
    /// Any use is an error (`StrictUndefined`).
    pub strict: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    Keys,
    Values,
    Items,
}

#[derive(Debug)]
pub struct Once {
    pub items: VecDeque<Value>,
    /// Its type in Python.
    pub name: &'static str,
}

/// The variable `loop`.
#[derive(Debug)]
pub struct Loop {
    pub items: Vec<Value>,
    pub index: Cell<usize>,
    pub depth: usize,
    pub last: RefCell<Option<Vec<Value>>>,
    /// Of a loop that may be called.
    pub recursion: Option<(Arc<For>, Rc<Scope>)>,
}

#[derive(Debug)]
pub struct MacroValue {
    pub definition: Arc<Macro>,
    pub scope: Rc<Scope>,
}

/// A dict keeps the order in which its keys came.
pub type Dict = IndexMap<Key, (Value, Value)>;

/// A value by which a dict finds things: equal values have equal keys.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Key {
    None,
    Undefined,
    Int(i128),
    Float(u64),
    Text(Arc<str>),
    Tuple(Vec<Key>),
    Slice,
    Identity(usize),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(Text { text: text.into(), markup: false })
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(Text { text: text.into(), markup: false })
    }
}

impl Value {
    pub fn list(items: Vec<Value>) -> Self {
        Self::List(Rc::new(RefCell::new(items)))
    }

    pub fn tuple(items: Vec<Value>) -> Self {
        Self::Tuple(Rc::new(items))
    }

    pub fn once(name: &'static str, items: Vec<Value>) -> Self {
        Self::Iterator(Rc::new(RefCell::new(Once { items: items.into(), name })))
    }

    pub fn dict(pairs: impl IntoIterator<Item = (Value, Value)>) -> Result<Self> {
        let mut dict = Dict::new();
        for (key, value) in pairs {
            insert(&mut dict, key, value)?;
        }
        Ok(Self::Dict(Rc::new(RefCell::new(dict))))
    }

    pub fn undefined(strict: bool, message: impl Into<String>) -> Self {
        Self::Undefined(Rc::new(Undefined { message: message.into(), strict }))
    }

    /// A value of JSON.
    pub fn from_json(json: &serde_json::Value) -> Self {
        match json {
            serde_json::Value::Null => Self::None,
            serde_json::Value::Bool(b) => Self::Bool(*b),
            serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64(), n.as_f64()) {
                (Some(n), _, _) => Self::Int(n.into()),
                (None, Some(n), _) => Self::Int(n.into()),
                (None, None, n) => Self::Float(n.unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(s) => s.as_str().into(),
            serde_json::Value::Array(items) => Self::list(items.iter().map(Self::from_json).collect()),
            serde_json::Value::Object(map) => {
                let pair = |(k, v): (&String, &serde_json::Value)| {
                    let text: Arc<str> = k.as_str().into();
                    let key = Self::Text(Text { text: text.clone(), markup: false });
                    (Key::Text(text), (key, Self::from_json(v)))
                };
                Self::Dict(Rc::new(RefCell::new(map.iter().map(pair).collect())))
            }
        }
    }

    /// Its type's name in Python.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(u) if u.strict => "StrictUndefined",
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Text(t) if t.markup => "Markup",
            Self::Text(_) => "str",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Group(_) => "_GroupTuple",
            Self::Dict(_) => "dict",
            Self::View(View::Keys, _) => "dict_keys",
            Self::View(View::Values, _) => "dict_values",
            Self::View(View::Items, _) => "dict_items",
            Self::Range(..) => "range",
            Self::Iterator(once) => once.borrow().name,
            Self::Namespace(_) => "Namespace",
            Self::Slice(_) => "slice",
            Self::Loop(_) => "LoopContext",
            Self::Cycler(_) => "Cycler",
            Self::Joiner(_) => "Joiner",
            Self::Macro(_) => "Macro",
            Self::Method(_) => "builtin_function_or_method",
            Self::Function(_) => "function",
        }
    }

    pub fn as_text(&self) -> Option<&str> {
        match self {
            Self::Text(t) => Some(&t.text),
            _ => None,
        }
    }

    /// A whole number as Python counts them: booleans are.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(n) => Some(*n),
            Self::Bool(b) => Some((*b).into()),
            _ => None,
        }
    }

    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(x) => Some(*x),
            other => other.as_int().map(|n| n as f64),
        }
    }

    /// The items of a tuple.
    pub fn as_tuple(&self) -> Option<&Rc<Vec<Value>>> {
        match self {
            Self::Tuple(items) | Self::Group(items) => Some(items),
            _ => None,
        }
    }

    /// An index: a whole number.
    pub fn index(&self, what: &str) -> Result<i128> {
        self.check()?;
        self.as_int()
            .ok_or_else(|| Error::failed(format!("{what} must be a whole number, found '{}'", self.type_name())))
    }

    /// The error that the use of an undefined value is.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Undefined(u) => Err(Error::new(ErrorKind::Undefined, u.message.clone())),
            _ => Ok(()),
        }
    }

    /// As [`Self::check`], where only a strict one is an error.
    pub fn check_strict(&self) -> Result<()> {
        match self {
            Self::Undefined(u) if u.strict => self.check(),
            _ => Ok(()),
        }
    }

    pub fn truth(&self) -> Result<bool> {
        self.check_strict()?;
        Ok(match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(b) => *b,
            Self::Int(n) => *n != 0,
            Self::Float(x) => *x != 0.0,
            Self::Text(t) => !t.text.is_empty(),
            Self::List(items) => !items.borrow().is_empty(),
            Self::Tuple(items) | Self::Group(items) => !items.is_empty(),
            Self::Dict(d) | Self::View(_, d) => !d.borrow().is_empty(),
            Self::Range(..) => self.length()? > 0,
            _ => true,
        })
    }

    pub fn length(&self) -> Result<usize> {
        self.check_strict()?;
        Ok(match self {
            Self::Undefined(_) => 0,
            Self::Text(t) => t.text.chars().count(),
            Self::List(items) => items.borrow().len(),
            Self::Tuple(items) | Self::Group(items) => items.len(),
            Self::Dict(d) | Self::View(_, d) => d.borrow().len(),
            Self::Range(start, stop, step) => range_length(*start, *stop, *step),
            Self::Loop(l) => l.items.len(),
            other => return Err(Error::failed(format!("object of type '{}' has no len()", other.type_name()))),
        })
    }

    /// All that is walked over; what can be walked over once is empty after it.
    pub fn iterate(&self) -> Result<Vec<Value>> {
        self.check_strict()?;
        Ok(match self {
            Self::Undefined(_) => Vec::new(),
            Self::Text(t) => t.text.chars().map(|c| Value::from(c.encode_utf8(&mut [0; 4]) as &str)).collect(),
            Self::List(items) => items.borrow().clone(),
            Self::Tuple(items) | Self::Group(items) => items.to_vec(),
            Self::Dict(d) | Self::View(View::Keys, d) => d.borrow().values().map(|(k, _)| k.clone()).collect(),
            Self::View(View::Values, d) => d.borrow().values().map(|(_, v)| v.clone()).collect(),
            Self::View(View::Items, d) => {
                d.borrow().values().map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()])).collect()
            }
            Self::Range(start, stop, step) => {
                let count = range_length(*start, *stop, *step);
                if count > MAX_RANGE {
                    return Err(Error::new(ErrorKind::Limit, format!("a range of {count} numbers")));
                }
                (0..count as i128).map(|i| Value::Int(start + i * step)).collect()
            }
            Self::Iterator(once) => once.borrow_mut().items.drain(..).collect(),
            other => return Err(Error::failed(format!("'{}' object is not iterable", other.type_name()))),
        })
    }

    /// The key by which a dict finds it.
    pub fn key(&self) -> Result<Key> {
        self.check_strict()?;
        Ok(match self {
            Self::None => Key::None,
            Self::Undefined(_) => Key::Undefined,
            Self::Bool(b) => Key::Int((*b).into()),
            Self::Int(n) => Key::Int(*n),
            Self::Float(x) if x.fract() == 0.0 && x.abs() < 1e38 => Key::Int(*x as i128),
            Self::Float(x) => Key::Float(x.to_bits()),
            Self::Text(t) => Key::Text(t.text.clone()),
            Self::Tuple(items) | Self::Group(items) => Key::Tuple(items.iter().map(Self::key).collect::<Result<_>>()?),
            Self::List(_) | Self::Dict(_) | Self::View(..) => {
                return Err(Error::failed(format!("unhashable type: '{}'", self.type_name())));
            }
            Self::Range(..) => Key::Text(self.repr()?.into()),
            Self::Slice(_) => Key::Slice,
            Self::Iterator(it) => Key::Identity(Rc::as_ptr(it) as *const u8 as usize),
            Self::Namespace(it) => Key::Identity(Rc::as_ptr(it) as *const u8 as usize),
            Self::Loop(it) => Key::Identity(Rc::as_ptr(it) as *const u8 as usize),
            Self::Cycler(it) => Key::Identity(Rc::as_ptr(it) as *const u8 as usize),
            Self::Joiner(it) => Key::Identity(Rc::as_ptr(it) as *const u8 as usize),
            Self::Macro(it) => Key::Identity(Rc::as_ptr(it) as *const u8 as usize),
            Self::Method(it) => Key::Tuple(vec![it.0.key().unwrap_or(Key::None), Key::Text(it.1.clone())]),
            Self::Function(name) => Key::Text(format!("<function {name}>").into()),
        })
    }

    /// `str(value)`.
    pub fn str(&self) -> Result<String> {
        match self {
            Self::Text(t) => Ok(t.text.to_string()),
            Self::Undefined(_) => self.check_strict().map(|()| String::new()),
            other => other.repr(),
        }
    }

    /// `repr(value)`.
    pub fn repr(&self) -> Result<String> {
        let mut out = String::new();
        self.write(&mut out, 0)?;
        Ok(out)
    }

    fn write(&self, out: &mut String, depth: usize) -> Result<()> {
        if depth > MAX_NESTING {
            return Err(Error::new(ErrorKind::Limit, "a value is nested too deeply to be printed"));
        }
        let sequence = |out: &mut String, open: &str, items: &[Value], close: &str| {
            out.push_str(open);
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                item.write(out, depth + 1)?;
            }
            out.push_str(close);
            Ok(())
        };
        let pairs = |out: &mut String, dict: &Dict| {
            out.push('{');
            for (i, (key, value)) in dict.values().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                key.write(out, depth + 1)?;
                out.push_str(": ");
                value.write(out, depth + 1)?;
            }
            out.push('}');
            Ok(())
        };
        match self {
            // Only as text of its own is a strict one an error.
            Self::Undefined(_) => out.push_str("Undefined"),
            Self::None => out.push_str("None"),
            Self::Bool(b) => out.push_str(if *b { "True" } else { "False" }),
            Self::Int(n) => out.push_str(&n.to_string()),
            Self::Float(x) => out.push_str(&float(*x)),
            Self::Text(t) if t.markup => out.push_str(&format!("Markup({})", quoted(&t.text))),
            Self::Text(t) => out.push_str(&quoted(&t.text)),
            Self::List(items) => sequence(out, "[", &items.borrow(), "]")?,
            Self::Tuple(items) | Self::Group(items) if items.len() == 1 => sequence(out, "(", items, ",)")?,
            Self::Tuple(items) | Self::Group(items) => sequence(out, "(", items, ")")?,
            Self::Dict(d) => pairs(out, &d.borrow())?,
            Self::View(..) => sequence(out, &format!("{}([", self.type_name()), &self.iterate()?, "])")?,
            Self::Range(start, stop, 1) => out.push_str(&format!("range({start}, {stop})")),
            Self::Range(start, stop, step) => out.push_str(&format!("range({start}, {stop}, {step})")),
            Self::Namespace(d) => {
                out.push_str("<Namespace ");
                pairs(out, &d.borrow())?;
                out.push('>');
            }
            Self::Slice(parts) => sequence(out, "slice(", &parts[..], ")")?,
            Self::Loop(l) => out.push_str(&format!("<LoopContext {}/{}>", l.index.get() + 1, l.items.len())),
            Self::Macro(m) => out.push_str(&format!("<Macro '{}'>", m.definition.name)),
            other => {
                let name = other.type_name();
                return Err(Error::unsupported(format!(
                    "a value of type '{name}' prints as a place in memory; `|list` makes a list of what can be walked over"
                )));
            }
        }
        Ok(())
    }

    /// `self == other`
    pub fn equals(&self, other: &Value) -> Result<bool> {
        self.equals_at(other, 0)
    }

    fn equals_at(&self, other: &Value, depth: usize) -> Result<bool> {
        self.check_strict()?;
        other.check_strict()?;
        if depth > MAX_NESTING {
            return Err(Error::new(ErrorKind::Limit, "values are nested too deeply to be compared"));
        }
        let all = |a: &[Value], b: &[Value]| -> Result<bool> {
            if a.len() != b.len() {
                return Ok(false);
            }
            for (a, b) in a.iter().zip(b) {
                if !a.equals_at(b, depth + 1)? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        if let (Some(a), Some(b)) = (self.as_int(), other.as_int()) {
            return Ok(a == b);
        }
        if let (Some(a), Some(b)) = (self.as_float(), other.as_float()) {
            return Ok(number_order(self, other).unwrap_or(a.partial_cmp(&b)) == Some(Ordering::Equal));
        }
        if let (Some(a), Some(b)) = (self.as_tuple(), other.as_tuple()) {
            return all(a, b);
        }
        Ok(match (self, other) {
            (Self::None, Self::None) | (Self::Undefined(_), Self::Undefined(_)) => true,
            (Self::Text(a), Self::Text(b)) => a.text == b.text,
            (Self::List(a), Self::List(b)) => Rc::ptr_eq(a, b) || all(&a.borrow(), &b.borrow())?,
            (Self::Dict(a), Self::Dict(b)) => {
                let (a, b) = (a.borrow(), b.borrow());
                if a.len() != b.len() {
                    return Ok(false);
                }
                for (key, (_, value)) in a.iter() {
                    match b.get(key) {
                        Some((_, other)) if value.equals_at(other, depth + 1)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (Self::View(View::Keys, a), Self::View(View::Keys, b)) => {
                let (a, b) = (a.borrow(), b.borrow());
                a.len() == b.len() && a.keys().all(|k| b.contains_key(k))
            }
            (Self::Range(..), Self::Range(..)) => all(&self.iterate()?, &other.iterate()?)?,
            _ => self.same(other),
        })
    }

    /// `self is other`, as far as templates can tell.
    pub fn same(&self, other: &Value) -> bool {
        match (self, other) {
            (Self::None, Self::None) => true,
            (Self::Bool(a), Self::Bool(b)) => a == b,
            (Self::Int(a), Self::Int(b)) => a == b,
            (Self::Float(a), Self::Float(b)) => a == b,
            (Self::Text(a), Self::Text(b)) => a.text == b.text && a.markup == b.markup,
            (Self::List(a), Self::List(b)) => Rc::ptr_eq(a, b),
            (Self::Tuple(a), Self::Tuple(b)) => Rc::ptr_eq(a, b) || (a.is_empty() && b.is_empty()),
            (Self::Dict(a), Self::Dict(b)) | (Self::Namespace(a), Self::Namespace(b)) => Rc::ptr_eq(a, b),
            (Self::Iterator(a), Self::Iterator(b)) => Rc::ptr_eq(a, b),
            (Self::Loop(a), Self::Loop(b)) => Rc::ptr_eq(a, b),
            (Self::Cycler(a), Self::Cycler(b)) => Rc::ptr_eq(a, b),
            (Self::Joiner(a), Self::Joiner(b)) => Rc::ptr_eq(a, b),
            (Self::Macro(a), Self::Macro(b)) => Rc::ptr_eq(a, b),
            (Self::Undefined(a), Self::Undefined(b)) => Rc::ptr_eq(a, b),
            (Self::Function(a), Self::Function(b)) => a == b,
            _ => false,
        }
    }

    /// Which of the two comes first, `None` where they cannot be told (NaN).
    ///
    /// # Errors
    /// Where Python does not order such values; `sign` is the operator, for the message.
    pub fn order(&self, other: &Value, sign: &str) -> Result<Option<Ordering>> {
        self.check()?;
        other.check()?;
        if let Some(order) = number_order(self, other) {
            return Ok(order);
        }
        let sequences = match (self, other) {
            (Self::Text(a), Self::Text(b)) => return Ok(Some(a.text.cmp(&b.text))),
            (Self::List(a), Self::List(b)) => Some((a.borrow().clone(), b.borrow().clone())),
            _ => match (self.as_tuple(), other.as_tuple()) {
                (Some(a), Some(b)) => Some((a.to_vec(), b.to_vec())),
                _ => None,
            },
        };
        let Some((a, b)) = sequences else {
            return Err(Error::failed(format!(
                "'{sign}' not supported between instances of '{}' and '{}'",
                self.type_name(),
                other.type_name()
            )));
        };
        for (a, b) in a.iter().zip(&b) {
            if !a.equals(b)? {
                return a.order(b, sign);
            }
        }
        Ok(Some(a.len().cmp(&b.len())))
    }
}

/// Numbers in one walk at most; of the sandbox of chat templates (`MAX_RANGE`).
pub const MAX_RANGE: usize = 100_000;

pub fn range_length(start: i128, stop: i128, step: i128) -> usize {
    let span = if step > 0 { stop.saturating_sub(start) } else { start.saturating_sub(stop) };
    if span <= 0 {
        return 0;
    }
    let step = step.unsigned_abs() as i128;
    usize::try_from((span - 1) / step + 1).unwrap_or(usize::MAX)
}

/// The order of two numbers, exactly; `None` where one is none.
fn number_order(a: &Value, b: &Value) -> Option<Option<Ordering>> {
    let exact = |n: i128, x: f64, swap: bool| {
        let order = if x.is_nan() {
            return None;
        } else if x.abs() >= 1.7e38 {
            if x > 0.0 { Ordering::Less } else { Ordering::Greater }
        } else {
            n.cmp(&(x.floor() as i128)).then(if x.fract() != 0.0 { Ordering::Less } else { Ordering::Equal })
        };
        Some(if swap { order.reverse() } else { order })
    };
    Some(match (a.as_int(), b.as_int(), a, b) {
        (Some(a), Some(b), _, _) => Some(a.cmp(&b)),
        (None, None, Value::Float(a), Value::Float(b)) => a.partial_cmp(b),
        (Some(a), None, _, Value::Float(b)) => exact(a, *b, false),
        (None, Some(b), Value::Float(a), _) => exact(b, *a, true),
        _ => return None,
    })
}

/// `dict[key] = value`; a key that is there already keeps its place and its first form.
pub fn insert(dict: &mut Dict, key: Value, value: Value) -> Result<()> {
    match dict.entry(key.key()?) {
        indexmap::map::Entry::Occupied(mut entry) => entry.get_mut().1 = value,
        indexmap::map::Entry::Vacant(entry) => {
            entry.insert((key, value));
        }
    }
    Ok(())
}
