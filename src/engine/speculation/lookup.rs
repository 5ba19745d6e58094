//! Guesses from the text itself: what followed where its end occurred before.

/// At most `count` tokens that followed the longest end of `tokens`, of `min` to `max` tokens, where that occurred before; of
/// several places the last that as many tokens follow as are asked for, or the one that most follow.
pub(super) fn lookup(tokens: &[u32], count: usize, min: usize, max: usize) -> &[u32] {
    let all = tokens.len();
    // Tokens in common, and where what followed begins.
    let mut best = (0, all);
    for at in (1..all).rev() {
        let pairs = tokens[..at].iter().rev().zip(tokens.iter().rev()).take(max);
        let common = pairs.take_while(|(a, b)| a == b).count();
        if common > best.0 || (common == best.0 && all - best.1 < count) {
            best = (common, at);
        }
        if best.0 == max && all - best.1 >= count {
            break;
        }
    }
    let (common, at) = best;
    if common < min { &[] } else { &tokens[at..all.min(at + count)] }
}

#[cfg(test)]
mod tests {
    use super::lookup;
    use proptest::prelude::*;

    #[test]
    fn what_followed_the_longest_end_is_guessed() {
        // 2 3 occurred twice, 1 2 3 once.
        let text = [1, 2, 3, 7, 8, 2, 3, 9, 1, 2, 3];
        assert_eq!(lookup(&text, 2, 1, 4), [7, 8]);
        assert_eq!(lookup(&text, 2, 1, 2), [9, 1], "the last of several places");
        assert_eq!(lookup(&text, 20, 1, 4), [7, 8, 2, 3, 9, 1, 2, 3]);
        assert_eq!(lookup(&text, 2, 4, 6), [], "nothing as long");
        assert_eq!(lookup(&[5, 5, 5, 5, 5], 3, 1, 2), [5, 5, 5], "as many as are asked for");
        assert_eq!(lookup(&[5, 5, 5], 3, 1, 2), [5, 5]);
        assert_eq!(lookup(&[4], 3, 1, 2), []);
        assert_eq!(lookup(&[], 3, 1, 2), []);
    }

    proptest! {
        #[test]
        fn a_guess_is_the_text_after_an_occurrence_and_none_is_longer(
            tokens in prop::collection::vec(0u32..3, 0..40), count in 1usize..6, min in 1usize..4, more in 0usize..4,
        ) {
            let (max, all) = (min + more, tokens.len());
            let guess = lookup(&tokens, count, min, max);
            // Places, not the text's end itself, after which its last `n` tokens stand.
            let places = |n: usize| -> Vec<usize> {
                (n..all).filter(|&at| tokens[at - n..at] == tokens[all - n..]).collect()
            };
            let longest = (min..=max).rev().find(|&n| n < all && !places(n).is_empty());
            let Some(longest) = longest else { return Ok(prop_assert!(guess.is_empty())) };
            let of = |at: usize| &tokens[at..all.min(at + count)];
            let most = places(longest).into_iter().map(|at| of(at).len()).max().unwrap();
            prop_assert_eq!(guess.len(), most);
            let last = places(longest).into_iter().rfind(|&at| of(at).len() == most).unwrap();
            prop_assert_eq!(guess, of(last));
        }
    }
}
