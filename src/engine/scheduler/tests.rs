//! The scheduler against a cache that is only a table of what each place holds.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;

use super::*;

/// What stands for keys and values of a token: a hash of all tokens up to it.
fn state(before: u64, token: u32) -> u64 {
    (before ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23) ^ 0x5bd1
}

/// The token that a model would choose after a sequence.
fn chosen(tokens: &[u32]) -> u32 {
    (tokens.iter().fold(0, |s, &t| state(s, t)) >> 40) as u32 % 3
}

/// What a sequence is to become.
struct Job {
    prompt: Vec<u32>,
    /// Tokens to choose; 0: something is to be known after each token from `wanted` on.
    choose: usize,
    wanted: usize,
    /// Positions after which something became known.
    known: Vec<usize>,
}

/// Carries plans out and checks them.
struct World {
    scheduler: Scheduler,
    cache: Vec<[u64; PAGE]>,
    /// What stands in each slot: the hash of the tokens that a recurrent layer has seen.
    slots: Vec<u64>,
    jobs: BTreeMap<Id, Job>,
    ended: HashMap<Id, Job>,
    computed: usize,
    steps: usize,
    /// Who guesses, if anybody.
    guesser: Option<Random>,
}

impl World {
    fn new(limits: Limits) -> Self {
        Self {
            scheduler: Scheduler::new(limits),
            cache: Vec::new(),
            slots: Vec::new(),
            jobs: BTreeMap::new(),
            ended: HashMap::new(),
            computed: 0,
            steps: 0,
            guesser: None,
        }
    }

    /// Adds guesses to a plan, two of three of them right.
    fn guess(&mut self, plan: &mut Plan) {
        let Some(random) = &mut self.guesser else { return };
        let chooses = |part: &Part| {
            let (tokens, job) = (self.scheduler.tokens(part.id), self.jobs.get(&part.id)?);
            let room = (job.prompt.len() + job.choose).checked_sub(tokens.len()).filter(|_| job.choose > 0)?;
            (part.range.end == tokens.len()).then(|| (part.id, tokens.to_vec(), room))
        };
        let choosing: Vec<_> = plan.parts.iter().filter_map(chooses).collect();
        let most = self.scheduler.guesses(plan, choosing.len());
        for (id, mut tokens, room) in choosing {
            let known = tokens.len();
            for _ in 0..random.below(most.min(room) + 1) {
                let wrong = random.below(3) as u32;
                tokens.push(if random.below(3) > 0 { chosen(&tokens) } else { wrong });
            }
            self.scheduler.guess(plan, id, &tokens[known..]);
        }
    }

    fn add(&mut self, prompt: Vec<u32>, choose: usize, wanted: usize) -> Id {
        let wanted = if choose > 0 { prompt.len() - 1 } else { wanted.min(prompt.len() - 1) };
        let id = self.scheduler.add(prompt.clone(), wanted);
        self.jobs.insert(id, Job { prompt, choose, wanted, known: Vec::new() });
        id
    }

    fn cancel(&mut self, id: Id) {
        self.scheduler.remove(id);
        self.jobs.remove(&id);
        self.check_pages();
    }

    /// Every page is free, or in the tree, or a sequence's; whoever uses one counts.
    fn check_pages(&self) {
        let mut users: HashMap<u32, u32> = HashMap::new();
        for s in self.scheduler.running.values() {
            for (i, &page) in s.pages.iter().enumerate() {
                assert!(!s.pages[..i].contains(&page), "a page twice in one sequence");
                *users.entry(page).or_default() += 1;
            }
            assert!(
                s.pages.len() * PAGE < s.computed + self.scheduler.limits.pass + PAGE,
                "more pages than tokens need"
            );
        }
        assert!(self.scheduler.waiting.values().all(|s| s.pages.is_empty() && s.computed == 0));
        let pages = &self.scheduler.pages;
        if let Some(kept) = self.scheduler.limits.states {
            let mut slots: Vec<u32> = self.scheduler.running.values().filter_map(|s| s.slot).collect();
            slots.extend(pages.slots_at_rest());
            slots.sort_unstable();
            assert_eq!(slots, (0..pages.slots() as u32).collect::<Vec<_>>(), "a slot is lost, or has two users");
            assert!(slots.len() <= self.scheduler.limits.sequences + kept);
            assert!(self.scheduler.running.values().all(|s| s.slot.is_some()));
        }
        assert!(pages.made() <= pages.limit());
        for page in 0..pages.made() as u32 {
            assert_eq!(pages.users(page), users.get(&page).copied().unwrap_or(0), "users of page {page}");
        }
        assert_eq!(pages.available(), pages.limit() - users.len(), "a page is lost");
    }

    fn step(&mut self) {
        self.steps += 1;
        let limits = *self.scheduler.limits();
        let mut plan = self.scheduler.plan();
        self.guess(&mut plan);
        assert!(self.jobs.is_empty() || !plan.parts.is_empty(), "nothing goes on");
        let total: usize = plan.parts.iter().map(Part::tokens).sum();
        assert!(total <= limits.pass && self.scheduler.running.len() <= limits.sequences);
        assert!(plan.pages <= limits.pages);
        self.cache.resize(plan.pages, [0; PAGE]);
        for copy in &plan.copies {
            self.cache[copy.to as usize] = self.cache[copy.from as usize];
        }
        self.slots.resize(plan.slots, 0);
        for &(from, to) in &plan.states {
            self.slots[to as usize] = self.slots[from as usize];
        }
        if limits.states.is_some() {
            assert!(plan.copies.is_empty(), "no state stands within a page");
            for (i, part) in plan.parts.iter().enumerate() {
                assert!(plan.parts[..i].iter().all(|p| p.slot != part.slot), "two sequences in a slot");
                let tokens = self.scheduler.tokens(part.id);
                let seen = |end: usize| tokens[..end].iter().fold(0, |s, &t| state(s, t));
                let slot = &mut self.slots[part.slot as usize];
                assert!(part.range.start == 0 || *slot == seen(part.range.start), "not the state of its tokens");
                *slot = seen(part.range.end);
            }
        }
        // All writes of a pass come before all reads, but nobody may write where another reads.
        let mut written = Vec::new();
        for part in &plan.parts {
            let tokens = [&self.scheduler.tokens(part.id)[..part.range.end], &part.guesses].concat();
            let mut before = tokens[..part.range.start].iter().fold(0, |s, &t| state(s, t));
            for (position, &token) in tokens.iter().enumerate().skip(part.range.start) {
                before = state(before, token);
                let page = part.pages[position / PAGE];
                assert_eq!(self.scheduler.pages.users(page), 1, "a shared page is written");
                self.cache[page as usize][position % PAGE] = before;
                written.push(page);
            }
        }
        for part in &plan.parts {
            let tokens = [&self.scheduler.tokens(part.id)[..part.range.end], &part.guesses].concat();
            let mut expected = 0;
            for (position, &token) in tokens.iter().enumerate() {
                expected = state(expected, token);
                let found = self.cache[part.pages[position / PAGE] as usize][position % PAGE];
                assert_eq!(found, expected, "token {position} of {:?} is not in its page", part.id);
            }
        }
        let kept = self.scheduler.computed(&plan);
        self.slots.resize(self.scheduler.slots(), 0);
        for (from, to) in kept {
            self.slots[to as usize] = self.slots[from as usize];
        }
        self.computed += total;
        self.check_pages();
        for part in plan.parts {
            self.known(&part);
        }
        let surplus = |s: &Sequence| s.pages.len() > s.tokens.len().div_ceil(PAGE);
        assert!(!self.scheduler.running.values().any(surplus), "pages of guesses that were wrong");
        self.check_pages();
    }

    fn known(&mut self, part: &Part) {
        let job = self.jobs.get_mut(&part.id).unwrap();
        let mut tokens = self.scheduler.tokens(part.id).to_vec();
        job.known.extend(part.range.clone().filter(|&p| p >= part.wanted));
        if part.range.end < tokens.len() {
            return;
        }
        let mut guesses = part.guesses.iter();
        while tokens.len() < job.prompt.len() + job.choose {
            let next = chosen(&tokens);
            let guessed = guesses.next() == Some(&next);
            assert_eq!(self.scheduler.push(part.id, next), guessed);
            if !guessed {
                return;
            }
            job.known.push(tokens.len());
            tokens.push(next);
        }
        self.scheduler.remove(part.id);
        let job = self.jobs.remove(&part.id).unwrap();
        let first = if job.choose > 0 { job.prompt.len() - 1 } else { job.wanted };
        assert_eq!(job.known, (first..tokens.len()).collect::<Vec<_>>(), "each is known once");
        let mut alone = job.prompt.clone();
        (0..job.choose).for_each(|_| alone.push(chosen(&alone)));
        assert_eq!(tokens, alone, "the sequence is what it would be alone");
        self.ended.insert(part.id, job);
    }

    fn finish(&mut self) {
        let bound = self.steps + 10_000;
        while !self.jobs.is_empty() {
            self.step();
            assert!(self.steps < bound, "{} sequences starve", self.jobs.len());
        }
        assert!(self.scheduler.is_empty());
        assert_eq!(self.scheduler.pages.available(), self.scheduler.limits().pages);
    }
}

fn limits(context: usize, pages: usize, sequences: usize, pass: usize) -> Limits {
    Limits { context, pages, kept: 8, sequences, pass, states: None }
}

/// Pseudo-random numbers of a simulation.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }

    /// Prompts of few tokens that begin like others'.
    fn prompt(&mut self, longest: usize) -> Vec<u32> {
        let shared = [0, 0, 5, 16, 37, 64][self.below(6)].min(longest - 1);
        let own = 1 + self.below((longest - shared).min(40));
        let mut tokens: Vec<u32> = (0..shared).map(|i| (i % 5) as u32).collect();
        tokens.extend((0..own).map(|_| self.below(2) as u32));
        tokens
    }
}

#[test]
fn thousands_of_arrivals_cancellations_and_shortages_end_well() {
    let recurrent = [None, None, None, None, None, Some(0), Some(1), Some(3), Some(40), Some(8)];
    for ((seed, pages), states) in (1..).zip([12, 14, 20, 40, 400, 12, 14, 20, 40, 400]).zip(recurrent) {
        let mut random = Random(seed);
        let limits = limits(12 * PAGE, pages, 1 + random.below(12), [7, 33, 64, 200][random.below(4)]);
        let mut world = World::new(Limits { states, ..limits });
        world.guesser = (states.is_none() && seed > 2).then_some(Random(seed));
        let (mut added, mut cancelled) = (0, 0);
        while added < 1500 {
            for _ in 0..random.below(3) {
                let prompt = random.prompt(11 * PAGE);
                let room = 12 * PAGE - prompt.len();
                let choose = if random.below(2) == 0 { 0 } else { random.below(room.min(60) + 1) };
                let wanted = random.below(prompt.len());
                world.add(prompt, choose, wanted);
                added += 1;
            }
            if random.below(6) == 0 && !world.jobs.is_empty() {
                let which = random.below(world.jobs.len());
                let id = *world.jobs.keys().nth(which).unwrap();
                world.cancel(id);
                cancelled += 1;
            }
            for _ in 0..random.below(4) {
                if !world.jobs.is_empty() {
                    world.step();
                }
            }
        }
        world.finish();
        let stats = world.scheduler.stats();
        assert!(world.guesser.is_none() || stats.accepted > 500 && stats.drafted > stats.accepted + 100, "{stats:?}");
        assert!(cancelled > 50 && world.ended.len() == added - cancelled, "{seed}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn whatever_arrives_is_computed_as_if_alone(
        seed in any::<u64>(), count in 1usize..40, pages in 4usize..40, sequences in 1usize..9, pass in 1usize..80,
        kept in 0usize..20, states in proptest::option::of(0usize..5), guesses: bool,
    ) {
        let mut random = Random(seed);
        let mut world = World::new(Limits { kept, states, ..limits(4 * PAGE, pages, sequences, pass) });
        world.guesser = (states.is_none() && guesses).then_some(Random(seed));
        for _ in 0..count {
            let prompt = random.prompt(3 * PAGE);
            let choose = random.below(PAGE + 1);
            let wanted = random.below(prompt.len());
            world.add(prompt, choose, wanted);
            for _ in 0..random.below(3) {
                world.step();
            }
            if random.below(8) == 0 && let Some(id) = world.jobs.keys().next_back().copied() {
                world.cancel(id);
            }
        }
        world.finish();
    }
}

#[test]
fn who_chooses_a_token_is_not_delayed_by_an_older_prompt_but_gives_way_to_it() {
    let beginning: Vec<u32> = (0..64).map(|i| i % 7).collect();
    let mut gave_way = 0;
    for length in 1..16 {
        let mut world = World::new(limits(12 * PAGE, 12, 4, 20));
        world.add([&beginning[..], &[1]].concat(), 0, 64);
        // It waits for the beginning, and is overtaken.
        let old = world.add([&beginning[..], &[2; 100]].concat(), 1, 0);
        let new = world.add(vec![9; length], 60, 0);
        while world.scheduler.tokens(new).len() == length {
            world.step();
        }
        while world.scheduler.tokens(old).len() == 164 {
            let before = world.scheduler.tokens(new).len();
            world.step();
            if world.scheduler.waiting.contains_key(&new) {
                gave_way += 1;
            } else {
                assert_eq!(world.scheduler.tokens(new).len(), before + 1);
            }
        }
        world.finish();
    }
    assert!(gave_way > 2);
}

#[test]
fn a_beginning_that_is_being_computed_is_waited_for_and_computed_once() {
    let mut world = World::new(Limits { kept: 50, ..limits(200, 100, 16, 512) });
    let beginning: Vec<u32> = (0..70).map(|i| i % 7).collect();
    for i in 0..4 {
        world.add([&beginning[..], &[100 + i, 5, 6]].concat(), 0, 70);
    }
    world.add(vec![9; 30], 0, 0);
    world.step();
    assert_eq!(world.computed, 73 + 30, "the first of them, and who overtook the others");
    world.finish();
    assert_eq!((world.computed, world.steps), (73 + 30 + 3 * 3, 2));
    // Fewer than a page of tokens are computed anew at once.
    world.add([&[50; 10][..], &[1]].concat(), 0, 0);
    world.add([&[50; 10][..], &[2]].concat(), 0, 0);
    world.step();
    assert!(world.jobs.is_empty());
}

#[test]
fn a_conversation_goes_on_where_it_ended() {
    let mut world = World::new(Limits { kept: 64, ..limits(1024, 64, 1, 512) });
    let id = world.add((0..100).collect(), 20, 0);
    while world.scheduler.tokens(id).len() < 119 {
        world.step();
    }
    let mut turn = world.scheduler.tokens(id).to_vec();
    world.finish();
    turn.push(chosen(&turn));
    let before = world.computed;
    world.add([&turn[..], &[7; 9]].concat(), 1, 0);
    world.step();
    assert_eq!(world.computed - before, 9, "only what is new");
}

#[test]
fn a_recurrent_beginning_is_shared_where_its_state_was_kept() {
    let recurrent = |states| World::new(Limits { kept: 64, states: Some(states), ..limits(1024, 200, 4, 512) });
    let beginning: Vec<u32> = (0..70).map(|i| i % 7).collect();
    let with = |end: &[u32]| [&beginning[..], end].concat();
    // The second and the third wait until the state of the 64 tokens that are whole pages is kept.
    let mut world = recurrent(2);
    for i in 0..3 {
        world.add(with(&[100 + i, 5, 6]), 0, 70);
    }
    world.finish();
    assert_eq!(world.computed, 73 + 2 * 9);
    // One that comes later finds it too, and one that parts elsewhere leaves its own.
    world.add(with(&[8; 60]), 0, 100);
    world.finish();
    assert_eq!(world.computed, 73 + 2 * 9 + 66);
    // Where two part, it is kept the second time, so that the third has it.
    let mut world = recurrent(8);
    for (i, computed) in [(0, 200), (1, 200), (2, 200 - 64)] {
        let before = world.computed;
        world.add(with(&[50 + i; 130]), 0, 199);
        world.finish();
        assert_eq!(world.computed - before, computed, "{i}");
    }
    // Without room for states everything is computed.
    let mut world = recurrent(0);
    for _ in 0..3 {
        world.add(with(&[1]), 0, 70);
    }
    world.finish();
    assert_eq!(world.computed, 3 * 71);
}

#[test]
fn the_newest_gives_way_and_the_oldest_never_does() {
    // Room for one and a half of two sequences that grow.
    let mut world = World::new(limits(10 * PAGE, 15, 4, 512));
    let old = world.add(vec![1; 5], 10 * PAGE - 5, 0);
    let new = world.add(vec![2; 5], 10 * PAGE - 5, 0);
    let mut gave_way = false;
    while world.jobs.contains_key(&old) {
        let length = world.scheduler.tokens(old).len();
        world.step();
        assert!(!world.jobs.contains_key(&old) || world.scheduler.tokens(old).len() == length + 1);
        gave_way |= world.scheduler.waiting.contains_key(&new);
    }
    assert!(gave_way);
    world.finish();
}

#[test]
fn pages_are_taken_as_tokens_need_them() {
    let mut world = World::new(Limits::new(8192, 1));
    world.add(vec![1; 20], 100, 0);
    world.step();
    assert_eq!(world.scheduler.pages.made(), 2);
    world.finish();
    assert_eq!(world.scheduler.pages.made(), 120usize.div_ceil(PAGE));
}
