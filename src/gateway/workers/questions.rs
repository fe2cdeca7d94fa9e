//! The questions whether a name is served that wait for one answer.
//!
//! Anybody may ask, as often as it likes, and a question holds nothing of what bounds a node's
//! requests. So those for one name wait together, while its workers are looked at once, and their
//! number is bounded.

use std::collections::HashMap;

use crate::name::ServiceName;

/// The names that are looked at at once.
const MAX_NAMES: usize = 1_024;

/// The questions that wait for one name: those of so many nodes within the second that it takes, if
/// its workers are gone. If they are there it takes a millisecond.
const MAX_PER_NAME: usize = 256;

#[derive(Debug)]
pub(super) struct Questions<Q> {
    waiting: HashMap<ServiceName, Vec<Q>>,
}

impl<Q> Default for Questions<Q> {
    fn default() -> Self {
        Self {
            waiting: HashMap::new(),
        }
    }
}

impl<Q> Questions<Q> {
    /// Lets a question wait; says whether it is the first one for its name. One too many is dropped,
    /// which answers that nobody knows.
    pub(super) fn add(&mut self, name: &ServiceName, question: Q) -> bool {
        if let Some(waiting) = self.waiting.get_mut(name) {
            if waiting.len() < MAX_PER_NAME {
                waiting.push(question);
            }
            return false;
        }
        let has_room = self.waiting.len() < MAX_NAMES;
        if has_room {
            self.waiting.insert(name.clone(), vec![question]);
        }
        has_room
    }

    /// All that wait for a name. The next one is the first again.
    pub(super) fn take(&mut self, name: &ServiceName) -> Vec<Q> {
        self.waiting.remove(name).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(n: usize) -> ServiceName {
        format!("name{n}").parse().unwrap()
    }

    #[test]
    fn questions_for_one_name_wait_together() {
        let mut questions = Questions::default();
        assert!(questions.add(&name(1), "a"));
        assert!(!questions.add(&name(1), "b"));
        assert!(questions.add(&name(2), "c"));
        assert_eq!(questions.take(&name(1)), ["a", "b"]);
        assert!(questions.add(&name(1), "d"), "it is looked at anew");
    }

    #[test]
    fn neither_many_questions_nor_many_names_grow_without_bound() {
        let mut questions = Questions::default();
        for question in 0..2 * MAX_PER_NAME {
            questions.add(&name(0), question);
        }
        let begun = (1..2 * MAX_NAMES).filter(|n| questions.add(&name(*n), 0));
        assert_eq!(begun.count(), MAX_NAMES - 1);
        assert_eq!(questions.waiting.len(), MAX_NAMES);
        assert_eq!(questions.take(&name(0)).len(), MAX_PER_NAME);
        assert!(
            questions.add(&name(2 * MAX_NAMES), 0),
            "there is room again"
        );
    }
}
