//! Records that kill the workers which map them.
//!
//! A worker can die on a record, or of something else (a machine out of memory, a `kill -9`) while it happens to be at one. So a record is condemned only when
//! two attempts died on it; the next attempt then leaves it out.

use cairn_proto::pb;

/// What is known of one map.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Poison {
    /// Where the last attempt died.
    suspect: Option<u64>,
    condemned: Vec<u64>,
}

impl Poison {
    /// An attempt died at `position`. True if that condemns a record: the next attempt will get further, so the earlier ones need not count. A job may
    /// leave out `may_skip` records of a map.
    pub fn died(&mut self, position: Option<&pb::RecordPosition>, may_skip: u64) -> bool {
        let at = position.filter(|position| position.exact).map(|position| position.ordinal);
        let again = at.is_some() && self.suspect == at;
        self.suspect = at;
        match at {
            Some(ordinal) if again && (self.condemned.len() as u64) < may_skip => {
                self.condemned.push(ordinal);
                self.suspect = None;
                true
            }
            _ => false,
        }
    }

    /// Records to leave out.
    pub fn condemned(&self) -> &[u64] {
        &self.condemned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_deaths_on_a_record_condemn_it() {
        let at = |ordinal, exact| pb::RecordPosition { ordinal, exact, ..Default::default() };
        let mut poison = Poison::default();
        assert!(!poison.died(Some(&at(5, true)), 2));
        // Died elsewhere, or nobody knows where: no two in a row.
        assert!(!poison.died(Some(&at(6, true)), 2));
        assert!(!poison.died(None, 2));
        assert!(!poison.died(Some(&at(6, false)), 2));
        assert!(!poison.died(Some(&at(6, false)), 2));
        assert!(!poison.died(Some(&at(6, true)), 2));
        assert!(poison.died(Some(&at(6, true)), 2));
        assert_eq!(poison.condemned(), [6]);
        for ordinal in [9, 11] {
            assert!(!poison.died(Some(&at(ordinal, true)), 2));
            assert_eq!(poison.died(Some(&at(ordinal, true)), 2), ordinal == 9);
        }
        assert_eq!(poison.condemned(), [6, 9]);
        assert!(!Poison::default().died(Some(&at(1, true)), 0));
    }
}
