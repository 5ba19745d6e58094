//! A run of blocks alone, of a model of which one block at a time is in memory: watched before and after, kept block by block,
//! resumed, and undone where it did harm.

use serde_json::{Map, Value};

use super::block::BlockReport;
use super::data::Data;
use super::distill::Watched;
use super::pace::Pace;
use super::parameter::Parameter;
use super::run_folder::RunFolder;
use super::stage::{Method, Stage};
use super::streamed::Streamed;
use super::student::BlockStudent;
use super::trainer::{Event, Measure, Outcome, Told, best_of, recorded, replayed, watched};
use super::{RecoverError, Result};
use crate::backend::BackendError;

/// What is trained how, and where it is kept.
pub struct BlockRun<'a, 'p> {
    pub data: &'a Data,
    /// Texts that are watched, by name.
    pub texts: Vec<(String, Data)>,
    /// The stage that there is.
    pub stage: &'a Stage,
    pub folder: &'a mut RunFolder,
    pub pace: &'a mut Pace<'p>,
    /// Called with every event as it happens.
    pub show: &'a mut dyn FnMut(&Event, Told),
}

impl BlockRun<'_, '_> {
    /// Trains the blocks that have not been trained; afterwards the model is the better of before and after, by the watched texts.
    ///
    /// # Errors
    /// Anything but numbers that leave their range: those end the run early with what was best until then.
    pub fn train(&mut self, model: &mut Streamed<'_>) -> Result<Outcome> {
        let Method::Block(options) = self.stage.method else {
            return Err(RecoverError::Asked(format!("{}: only blocks are trained one at a time", self.stage.name)));
        };
        let lines = model.resume(self.folder)?;
        let mut events = replayed(self.folder, lines, self.show)?;
        let layers = model.config.layers.len();
        let texts = model.watch(std::mem::take(&mut self.texts))?;
        if !events.iter().any(|e| matches!(e, Event::Watched { .. })) {
            self.look(model, &texts, 0, &mut events)?;
        }
        let stopped = match self.blocks(model, options, layers, &mut events) {
            Ok(()) => self.look(model, &texts, layers, &mut events).err(),
            Err(error) => Some(error),
        };
        let stopped = match stopped {
            None | Some(RecoverError::NotFinite { .. }) => stopped,
            Some(error) => return Err(error),
        };
        // Where nothing is watched, the last is the best.
        let last = stopped.is_none() && texts.is_empty();
        let step = if last { layers } else { best_of(&events, 0).map_or(0, |b| b.step) };
        if step == 0 {
            model.forget();
        }
        recorded(self.folder, self.show, &mut events, Event::Kept { stage: 0, step })?;
        Ok(Outcome { events, stopped })
    }

    fn blocks(
        &mut self,
        model: &mut Streamed<'_>,
        options: super::block::Options,
        layers: usize,
        events: &mut Vec<Event>,
    ) -> Result<()> {
        let Self { data, folder, pace, show, .. } = self;
        let done = model.done();
        pace.begin_blocks(0, done, layers)?;
        let learned = |p: &Parameter| p.is_quantized() || (options.norms && p.is_norm());
        let scratch = folder.folder().to_owned();
        let steps = pace.schedule(0).of_block(done);
        let each = &mut |report: &BlockReport, student: &BlockStudent| {
            let &BlockReport { block, before, after } = report;
            recorded(folder, show, events, Event::Block { stage: 0, block, before, after })?;
            let kept = folder.save_trained(student, learned, block)?;
            pace.block_done(0, block + 1, layers)?;
            Ok((pace.schedule(0).of_block(block + 1), kept))
        };
        model.train(data, &options, &scratch, steps, each)
    }

    fn look(&mut self, model: &Streamed<'_>, texts: &[Watched], step: usize, events: &mut Vec<Event>) -> Result<()> {
        let losses = match model.losses(texts) {
            // A student that training broke; one that was broken from the start is an error of its own.
            Err(RecoverError::Backend(BackendError::NotFinite { place, value, .. })) if step > 0 => {
                let what = format!("loss on the watched texts ({place})");
                return Err(RecoverError::NotFinite { what, step, value: value.into() });
            }
            losses => losses?,
        };
        let mut loss = Map::new();
        for (text, value) in texts.iter().zip(losses) {
            if !value.is_finite() {
                return Err(RecoverError::NotFinite { what: format!("loss on {}", text.name), step, value });
            }
            loss.insert(text.name.clone(), Value::from(value));
        }
        let event = watched(events, 0, step, Measure::Kl, loss);
        recorded(self.folder, self.show, events, event)
    }
}
