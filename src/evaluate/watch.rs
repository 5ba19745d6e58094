//! What a long piece of work tells whoever watches it: the command line shows it, a server may keep it, nobody need.

/// How far a piece of work is, and what is to be known of it. Each has an end before the next begins.
pub trait Watch {
    /// `what` begins: so many parts, of which `done` are there already.
    fn begin(&mut self, what: &str, parts: u64, done: u64);

    /// One more part of it is done.
    fn part(&mut self);

    /// It is over.
    fn end(&mut self);

    /// A line for people.
    fn say(&mut self, line: &str);
}

/// Nobody watches.
impl Watch for () {
    fn begin(&mut self, _: &str, _: u64, _: u64) {}
    fn part(&mut self) {}
    fn end(&mut self) {}
    fn say(&mut self, _: &str) {}
}
