//! JSON schemas as llguidance can enforce them: what it cannot is refused by name, what says nothing of the value is left out.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::GrammarError;
use super::union::are_disjoint;

/// Of a schema: values in it, of all kinds; how deep they lie in each other; bytes of texts and names.
const MAX_VALUES: usize = 20_000;
const MAX_DEPTH: usize = 64;
const MAX_BYTES: usize = 1 << 20;
/// Of one object.
const MAX_PROPERTIES: usize = 1_000;
/// Schemas that may follow each other by `$ref`, one below the other, each as deep as it is.
const MAX_CHAIN: usize = 4_000;
/// Of numbers: llguidance counts with binary fractions of 53 bits, and integers of 64.
const MAX_NUMBER: f64 = 1e15;
/// Of repetition: items and properties; and characters, each of which takes some ten states of the automaton.
const MAX_COUNT: u64 = 100_000;
const MAX_LENGTH: u64 = 20_000;

/// Keywords whose value is a schema, a list of schemas, and schemas by name.
const ONE: [&str; 3] = ["items", "additionalItems", "additionalProperties"];
const LIST: [&str; 5] = ["items", "prefixItems", "anyOf", "allOf", "oneOf"];
const NAMED: [&str; 2] = ["properties", "patternProperties"];
/// Those with a value of their own.
const PLAIN: [&str; 8] =
    ["const", "required", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"];
/// Numbers of times.
const COUNTS: [&str; 6] = ["minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"];
/// What says something of the value that no grammar of llguidance says, in any draft.
const REFUSED: [&str; 15] = [
    "not",
    "if",
    "then",
    "else",
    "contains",
    "minContains",
    "maxContains",
    "propertyNames",
    "dependencies",
    "dependentRequired",
    "dependentSchemas",
    "unevaluatedItems",
    "unevaluatedProperties",
    "$dynamicRef",
    "$recursiveRef",
];
const TYPES: [&str; 7] = ["null", "boolean", "integer", "number", "string", "array", "object"];
/// Formats of texts that llguidance knows; others say nothing.
const FORMATS: [&str; 10] =
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"];

/// A schema all of which is enforced.
#[derive(Debug, Clone)]
pub(super) struct Enforced {
    pub schema: Value,
    /// What it refers to, as `#/$defs/NAME`.
    pub definitions: Map<String, Value>,
}

impl Enforced {
    /// Any object.
    pub(super) fn any_object() -> Self {
        Self { schema: json!({"type": "object"}), definitions: Map::new() }
    }

    /// What of a schema can be enforced.
    ///
    /// # Errors
    /// What cannot, by its place.
    pub(super) fn new(schema: &Value) -> Result<Self, GrammarError> {
        Self::with_prefix(schema, "")
    }

    /// The same, whose definitions are named apart from those of other schemas.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub(super) fn with_prefix(schema: &Value, prefix: &str) -> Result<Self, GrammarError> {
        measure(schema)?;
        let mut cleaner =
            Cleaner { root: schema, prefix, targets: HashMap::new(), queue: Vec::new(), depth: 0, deepest: 0 };
        let cleaned = cleaner.schema(schema, &mut Place::default())?;
        let (mut definitions, mut chain) = (Map::new(), cleaner.deepest);
        while let Some((pointer, name)) = cleaner.queue.pop() {
            let target = resolve(schema, &pointer).unwrap_or(&Value::Null);
            cleaner.deepest = 0;
            let mut place = Place(pointer.trim_start_matches('#').split('/').skip(1).map(str::to_owned).collect());
            let definition = cleaner.schema(target, &mut place)?;
            definitions.insert(name, definition);
            chain += cleaner.deepest;
            if chain > MAX_CHAIN {
                return Err(at("#", format!("its definitions are {chain} schemas deep; {MAX_CHAIN} are allowed")));
            }
        }
        Ok(Self { schema: cleaned, definitions })
    }

    /// As llguidance takes it, with how JSON is to be written.
    pub(super) fn for_llguidance(&self) -> Value {
        let mut schema = match &self.schema {
            Value::Object(keywords) => keywords.clone(),
            // True and false.
            other => Map::from_iter([("allOf".to_owned(), json!([other]))]),
        };
        if !self.definitions.is_empty() {
            schema.insert("$defs".to_owned(), self.definitions.clone().into());
        }
        let writing = json!({
            // A model that is fond of white space would fill its answer with it.
            "whitespace_pattern": r"\x20|\x0D?\x0A(\x20{0,32}|\x09{0,16})",
            // A name has one spelling, so that none is written twice.
            "json_allowed_escapes": "nrbtf\\\"",
        });
        schema.insert("x-guidance".to_owned(), writing);
        schema.into()
    }
}

fn at(place: &str, detail: impl Into<String>) -> GrammarError {
    GrammarError::Schema { place: place.to_owned(), detail: detail.into() }
}

/// Whether a schema is of a size to look at, without going down it.
fn measure(schema: &Value) -> Result<(), GrammarError> {
    let (mut values, mut bytes) = (0, 0);
    let mut rest = vec![(schema, 1)];
    while let Some((value, depth)) = rest.pop() {
        values += 1;
        match value {
            Value::String(text) => bytes += text.len(),
            Value::Array(items) => rest.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(fields) => {
                bytes += fields.keys().map(String::len).sum::<usize>();
                rest.extend(fields.values().map(|value| (value, depth + 1)));
            }
            _ => {}
        }
        let (what, limit) = match () {
            () if depth > MAX_DEPTH => ("levels", MAX_DEPTH),
            () if values > MAX_VALUES => ("values", MAX_VALUES),
            () if bytes > MAX_BYTES => ("bytes of text", MAX_BYTES),
            () => continue,
        };
        return Err(at("#", format!("it has more than the {limit} {what} that are allowed")));
    }
    Ok(())
}

/// What a reference within a schema refers to.
pub(super) fn resolve<'v>(root: &'v Value, reference: &str) -> Option<&'v Value> {
    let pointer = reference.strip_prefix('#')?;
    if pointer.contains('%') {
        let bytes = percent_decoded(pointer)?;
        return root.pointer(&bytes);
    }
    root.pointer(pointer)
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut parts = text.split('%');
    bytes.extend_from_slice(parts.next()?.as_bytes());
    for part in parts {
        bytes.push(u8::from_str_radix(part.get(..2)?, 16).ok()?);
        bytes.extend_from_slice(&part.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok()
}

/// Where one is in a schema.
#[derive(Default)]
struct Place(Vec<String>);

impl Place {
    fn error(&self, keyword: &str, detail: impl Into<String>) -> GrammarError {
        let place: String = self
            .0
            .iter()
            .map(String::as_str)
            .chain(Some(keyword).filter(|k| !k.is_empty()))
            .fold("#".into(), |p, s| p + "/" + s);
        at(&recoup_ground::shorten::shorten(&place, 200), detail)
    }
}

struct Cleaner<'v> {
    root: &'v Value,
    prefix: &'v str,
    /// Names of what is referred to.
    targets: HashMap<String, String>,
    /// Of these, those that were not looked at yet.
    queue: Vec<(String, String)>,
    /// Schemas that lie in each other, now and at most.
    depth: usize,
    deepest: usize,
}

impl Cleaner<'_> {
    /// A schema and those in it. Recursion is as deep as the schema.
    fn schema(&mut self, schema: &Value, place: &mut Place) -> Result<Value, GrammarError> {
        self.depth += 1;
        self.deepest = self.deepest.max(self.depth);
        let cleaned = self.keywords(schema, place);
        self.depth -= 1;
        cleaned
    }

    fn keywords(&mut self, schema: &Value, place: &mut Place) -> Result<Value, GrammarError> {
        let keywords = match schema {
            Value::Bool(_) => return Ok(schema.clone()),
            Value::Object(keywords) => keywords,
            other => return Err(place.error("", format!("expected an object, true or false, found {}", kind(other)))),
        };
        if let Some(count) = ["properties", "required"].iter().filter_map(|key| length(keywords.get(*key)?)).max()
            && count > MAX_PROPERTIES
        {
            return Err(place.error("properties", format!("{count} properties; {MAX_PROPERTIES} are allowed")));
        }
        let mut cleaned = Map::new();
        for (key, value) in keywords {
            place.0.push(key.clone());
            let kept = self.keyword(key, value, keywords, place);
            place.0.pop();
            if let Some((key, value)) = kept? {
                cleaned.insert(key, value);
            }
        }
        check_counts(&cleaned, place)?;
        Ok(cleaned.into())
    }

    /// A keyword and its value, as they are enforced; nothing, where it says nothing of the value.
    fn keyword(
        &mut self,
        key: &str,
        value: &Value,
        of: &Map<String, Value>,
        place: &mut Place,
    ) -> Result<Option<(String, Value)>, GrammarError> {
        let kept = match (key, value) {
            ("$ref", Value::String(reference)) => self.reference(reference, place)?,
            ("type", _) => check_type(value, place)?,
            ("enum", Value::Array(values)) if !values.is_empty() => {
                check_numbers(value, place)?;
                value.clone()
            }
            ("enum", _) => return Err(place.error("", "expected a list of values")),
            ("format", Value::String(format)) if FORMATS.contains(&format.as_str()) => value.clone(),
            ("format", _) | ("uniqueItems", Value::Bool(false)) => return Ok(None),
            ("uniqueItems", _) => return Err(refused(key, place)),
            ("pattern", Value::String(pattern)) => {
                check_pattern(pattern, place)?;
                value.clone()
            }
            (_, Value::Array(schemas)) if LIST.contains(&key) => {
                let mut cleaned = Vec::with_capacity(schemas.len());
                for (index, schema) in schemas.iter().enumerate() {
                    place.0.push(index.to_string());
                    cleaned.push(self.schema(schema, place)?);
                    place.0.pop();
                }
                // Of options of which no value has two, one is any.
                if key == "oneOf" && !of.contains_key("anyOf") && are_disjoint(self.root, schemas) {
                    return Ok(Some(("anyOf".to_owned(), cleaned.into())));
                }
                cleaned.into()
            }
            (_, Value::Object(schemas)) if NAMED.contains(&key) => {
                let mut cleaned = Map::new();
                for (name, schema) in schemas {
                    if key == "patternProperties" {
                        check_pattern(name, place)?;
                    }
                    place.0.push(name.clone());
                    cleaned.insert(name.clone(), self.schema(schema, place)?);
                    place.0.pop();
                }
                cleaned.into()
            }
            _ if ONE.contains(&key) => self.schema(value, place)?,
            _ if LIST.contains(&key) || NAMED.contains(&key) || key == "$ref" => {
                return Err(place.error("", format!("found {}, which means nothing here", kind(value))));
            }
            _ if COUNTS.contains(&key) => {
                let most = if key.ends_with("Length") { MAX_LENGTH } else { MAX_COUNT };
                match value.as_u64().or_else(|| whole(value)) {
                    Some(count) if count <= most => count.into(),
                    Some(count) => return Err(place.error("", format!("{count}; up to {most} can be enforced"))),
                    None => return Err(place.error("", format!("expected a number from 0, found {}", kind(value)))),
                }
            }
            _ if PLAIN.contains(&key) => {
                check_numbers(value, place)?;
                value.clone()
            }
            _ if REFUSED.contains(&key) => return Err(refused(key, place)),
            _ => return Ok(None),
        };
        Ok(Some((key.to_owned(), kept)))
    }

    /// A reference to a definition by its new name.
    fn reference(&mut self, reference: &str, place: &Place) -> Result<Value, GrammarError> {
        if !reference.starts_with('#') {
            return Err(place.error(
                "",
                format!("`{reference}` is outside of the schema; nothing is fetched, put it into `$defs`"),
            ));
        }
        if resolve(self.root, reference).is_none() {
            return Err(
                place.error("", format!("`{reference}` is not in the schema; references are like `#/$defs/NAME`"))
            );
        }
        let name = match self.targets.get(reference) {
            Some(name) => name.clone(),
            None => {
                let name = format!("{}{}", self.prefix, self.targets.len());
                self.targets.insert(reference.to_owned(), name.clone());
                self.queue.push((reference.to_owned(), name.clone()));
                name
            }
        };
        Ok(format!("#/$defs/{name}").into())
    }
}

fn refused(keyword: &str, place: &Place) -> GrammarError {
    place.error("", format!("`{keyword}` cannot be enforced; leave it out, and check the answer for it"))
}

fn check_type(value: &Value, place: &Place) -> Result<Value, GrammarError> {
    let is_type = |value: &Value| value.as_str().is_some_and(|name| TYPES.contains(&name));
    match value {
        Value::Array(types) if !types.is_empty() && types.iter().all(is_type) => Ok(value.clone()),
        one if is_type(one) => Ok(value.clone()),
        other => Err(place.error("", format!("expected one of {TYPES:?} or a list of them, found {other}"))),
    }
}

/// Whether llguidance can tell the numbers in a value from others.
fn check_numbers(value: &Value, place: &Place) -> Result<(), GrammarError> {
    let mut rest = vec![value];
    while let Some(value) = rest.pop() {
        match value {
            Value::Number(number) if number.as_f64().is_none_or(|number| number.abs() > MAX_NUMBER) => {
                return Err(place.error("", format!("{number}; numbers up to {MAX_NUMBER:e} can be enforced")));
            }
            Value::Array(items) => rest.extend(items),
            Value::Object(fields) => rest.extend(fields.values()),
            _ => {}
        }
    }
    Ok(())
}

/// llguidance gives a group of this name a meaning of its own.
fn check_pattern(pattern: &str, place: &Place) -> Result<(), GrammarError> {
    if pattern.contains("<stop>") { Err(place.error("", "a group may not be named `stop`")) } else { Ok(()) }
}

/// Free names may be the same one twice, which then count once.
fn check_counts(cleaned: &Map<String, Value>, place: &Place) -> Result<(), GrammarError> {
    let Some(least) = cleaned.get("minProperties").and_then(Value::as_u64) else { return Ok(()) };
    let required = cleaned.get("required").and_then(length).unwrap_or(0) as u64;
    if least > required + 1 {
        let detail =
            format!("at most one more than the {required} required properties can be asked for, found {least}");
        return Err(place.error("minProperties", detail));
    }
    Ok(())
}

fn length(value: &Value) -> Option<usize> {
    value.as_array().map(Vec::len).or_else(|| value.as_object().map(Map::len))
}

/// A number that is a whole one, written with a point.
fn whole(value: &Value) -> Option<u64> {
    let number = value.as_f64().filter(|n| n.fract() == 0.0 && (0.0..1e19).contains(n))?;
    Some(number as u64)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
