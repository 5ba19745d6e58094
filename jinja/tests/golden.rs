//! Templates compute what Jinja2 computes: golden/jinja.py wrote what it makes of them.

use recoup_jinja::{ErrorKind, Options, Settings, Template};
use serde_json::{Map, Value, json};

fn render(
    source: &str,
    settings: Settings,
    context: &Map<String, Value>,
) -> Result<String, (ErrorKind, String, usize)> {
    let options = Options { steps: 5_000_000, max_text: 1 << 20, now: None };
    let rendered = Template::parse(source, settings).and_then(|t| t.render(context, &options));
    rendered.map_err(|e| (e.kind, e.message, e.line))
}

/// In the golden file and refused by name: tags and types without use in prompts.
const REFUSED: usize = 8;

#[test]
fn templates_compute_what_jinja2_computes_or_are_refused() {
    let mut lines = include_str!("golden/jinja.jsonl").lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
    let variables = lines.next().unwrap()["variables"].as_object().unwrap().clone();
    let (mut compared, mut refused, mut failures) = (0, 0, Vec::new());
    for row in lines {
        let settings = if row["settings"] == "chat" { Settings::CHAT } else { Settings::TASK };
        let result = render(row["template"].as_str().unwrap(), settings, &variables);
        compared += 1;
        match (&result, row["text"].as_str()) {
            (Ok(text), Some(expected)) if text == expected => {}
            (Err((ErrorKind::Unsupported, ..)), _) => refused += 1,
            (Err(_), None) => {}
            _ => failures.push(format!("{row}\n  {result:?}")),
        }
    }
    assert!(compared > 2000, "{compared}");
    assert!(failures.is_empty(), "{} of {compared}:\n{}", failures.len(), failures.join("\n"));
    assert!(refused <= REFUSED + 8, "{refused} are not supported");
}

#[test]
fn an_error_names_its_line_and_whose_fault_it_is() {
    let none = Map::new();
    let error = |source: &str| render(source, Settings::CHAT, &none).unwrap_err();
    assert_eq!(
        error("a\n{% if %}"),
        (ErrorKind::Syntax, "Expected an expression, got end of statement block".into(), 2)
    );
    assert_eq!(error("\n\n{{ x.y }}"), (ErrorKind::Undefined, "'x' is undefined".into(), 3));
    assert_eq!(error("{{ 'a'|nope }}"), (ErrorKind::Syntax, "No filter named 'nope'.".into(), 1));
    assert_eq!(error("{{\n'a'|random }}").0, ErrorKind::Unsupported);
    assert_eq!(error("{{ raise_exception('no') }}"), (ErrorKind::Raised, "no".into(), 1));
    assert_eq!(error("a\r\nb\rc{{ 1 + 'a' }}").2, 3);
    let endless = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    assert_eq!(error(endless).0, ErrorKind::Limit);
}

#[test]
fn line_ends_of_a_template_are_plain_and_those_of_values_stay() {
    let context = json!({"v": "a\r\nb"});
    let context = context.as_object().unwrap();
    for source in ["x\r\n{{ v }}\r\ny", "x\r{{ v }}\ry", "x\n{{ v }}\ny"] {
        assert_eq!(render(source, Settings::CHAT, context).unwrap(), "x\na\r\nb\ny", "{source:?}");
        assert_eq!(render(source, Settings::TASK, context).unwrap(), "x\na\r\nb\ny", "{source:?}");
    }
}

#[test]
fn the_sandbox_of_chat_templates_changes_no_value() {
    let context = json!({"l": [1]});
    let context = context.as_object().unwrap();
    let append = "{% set _ = l.append(2) %}{{ l }}";
    let (kind, message, _) = render(append, Settings::CHAT, context).unwrap_err();
    assert_eq!(kind, ErrorKind::Undefined);
    assert!(message.contains("'append' of 'list'"), "{message}");
    assert_eq!(render(append, Settings::TASK, context).unwrap(), "[1, 2]");
}
