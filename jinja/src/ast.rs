//! A parsed template: statements and expressions.

use std::sync::Arc;

pub type Name = Arc<str>;

#[derive(Debug)]
pub enum Statement {
    Text(Name),
    Print(Vec<Expr>),
    Set(Target, Expr),
    /// Target, filter over the text (its value is [`ExprKind::Body`]), body.
    SetBlock(Target, Option<Expr>, Vec<Statement>),
    /// Condition and body, in order; then what else.
    If(Vec<(Expr, Vec<Statement>)>, Vec<Statement>),
    For(Arc<For>),
    Macro(Arc<Macro>),
    /// `{% call %}`: the call, and the body as a macro.
    Call(Expr, Arc<Macro>),
    Filter(Expr, Vec<Statement>),
    With(Vec<(Target, Expr)>, Vec<Statement>),
    /// Whether it sees the variables around it, body.
    Block(bool, Vec<Statement>),
    /// A scope of its own.
    Scope(Vec<Statement>),
    /// `include`, `import`, `extends`: there are no other templates; what it is and its line.
    Foreign(&'static str, u32),
    Break,
    Continue,
}

#[derive(Debug)]
pub struct For {
    pub target: Target,
    pub iter: Expr,
    pub test: Option<Expr>,
    pub recursive: bool,
    pub body: Vec<Statement>,
    pub otherwise: Vec<Statement>,
    pub line: u32,
}

#[derive(Debug)]
pub struct Macro {
    pub name: Name,
    pub parameters: Vec<Name>,
    /// Of the last parameters.
    pub defaults: Vec<Expr>,
    pub body: Vec<Statement>,
    /// Names that the body uses decide what a call may pass.
    pub catches_varargs: bool,
    pub catches_kwargs: bool,
    pub uses_caller: bool,
}

#[derive(Debug)]
pub enum Target {
    Name(Name),
    /// `namespace.attribute`
    Attribute(Name, Name),
    Tuple(Vec<Target>),
}

#[derive(Debug)]
pub struct Expr {
    pub kind: ExprKind,
    pub line: u32,
}

#[derive(Debug)]
pub enum ExprKind {
    Const(Const),
    Name(Name),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attribute(Box<Expr>, Name),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<[Option<Expr>; 3]>),
    Call(Box<Expr>, Arguments),
    Filter(Box<Expr>, Name, Arguments),
    Test(Box<Expr>, Name, Arguments),
    /// The text of the block that a filter is applied to.
    Body,
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    Binary(Binary, Box<Expr>, Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    Concat(Vec<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    /// Condition, then, else.
    Condition(Box<Expr>, Box<Expr>, Option<Box<Expr>>),
}

#[derive(Debug, Default)]
pub struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(Name, Expr)>,
    pub rest: Option<Box<Expr>>,
    pub named_rest: Option<Box<Expr>>,
}

#[derive(Clone, Debug)]
pub enum Const {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(Name),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Mod,
    Pow,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    In,
    NotIn,
}
