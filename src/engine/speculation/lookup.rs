//! Guesses from the text itself: what followed where its end occurred before.

/// `count` tokens that followed the longest end of `tokens`, of `min` to `max` tokens, where that occurred last before; where
/// fewer follow, the text has begun to repeat itself, and is taken to go on so. Empty where nothing as long occurred.
pub(super) fn lookup(tokens: &[u32], count: usize, min: usize, max: usize) -> Vec<u32> {
    let all = tokens.len();
    // Tokens in common, and where what followed begins.
    let mut best = (0, 0);
    for at in (1..all).rev() {
        let pairs = tokens[..at].iter().rev().zip(tokens.iter().rev()).take(max);
        let common = pairs.take_while(|(a, b)| a == b).count();
        if common > best.0 {
            best = (common, at);
            if common == max {
                break;
            }
        }
    }
    let (common, at) = best;
    if common < min { Vec::new() } else { tokens[at..].iter().copied().cycle().take(count).collect() }
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
        assert_eq!(lookup(&text, 10, 1, 2), [9, 1, 2, 3, 9, 1, 2, 3, 9, 1], "and so on");
        assert_eq!(lookup(&[5, 5, 5], 3, 1, 2), [5, 5, 5]);
        assert!(lookup(&text, 2, 4, 6).is_empty(), "nothing as long");
        assert!(lookup(&[4], 3, 1, 2).is_empty());
        assert!(lookup(&[], 3, 1, 2).is_empty());
    }

    proptest! {
        #[test]
        fn a_guess_is_the_text_after_the_last_place_and_none_is_longer(
            tokens in prop::collection::vec(0u32..3, 0..40), count in 1usize..6, min in 1usize..4, more in 0usize..4,
        ) {
            let (max, all) = (min + more, tokens.len());
            let guess = lookup(&tokens, count, min, max);
            // The last place, not the text's end itself, before which its last `n` tokens stand.
            let place = |n: usize| (n..all).rev().find(|&at| tokens[at - n..at] == tokens[all - n..]);
            let Some(at) = (min..=max).rev().filter(|n| *n < all).find_map(place) else {
                prop_assert!(guess.is_empty());
                return Ok(());
            };
            let mut text = tokens.clone();
            (0..count).for_each(|i| text.push(text[at + i]));
            prop_assert_eq!(&guess[..], &text[all..]);
        }
    }
}
