//! Which map outputs a reduce still has to fetch, by the node that holds them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use cairn_proto::pb::MapOutputLocation;

/// Outputs that are known, and what became of them.
pub struct Wanted {
    maps: usize,
    /// By map: the attempt whose output is to be fetched, was, or is being.
    known: HashMap<u32, u32>,
    /// Maps whose outputs are being fetched or were.
    taken: HashSet<u32>,
    /// What is to be fetched, by address.
    queued: BTreeMap<String, Vec<MapOutputLocation>>,
    /// Nodes that are being asked.
    busy: BTreeSet<String>,
}

impl Wanted {
    /// One output of each of `maps` maps.
    pub fn new(maps: u32) -> Self {
        let (known, taken, queued, busy) = Default::default();
        Self { maps: maps as usize, known, taken, queued, busy }
    }

    /// Learns of outputs. A map that ran again has its output where it was made last, unless the earlier one is here already.
    pub fn add(&mut self, inputs: Vec<MapOutputLocation>) {
        for input in inputs {
            if self.taken.contains(&input.map_index) {
                continue;
            }
            match self.known.insert(input.map_index, input.attempt) {
                Some(attempt) if attempt == input.attempt => continue,
                Some(_) => self.queued.values_mut().for_each(|queue| {
                    queue.retain(|other| other.map_index != input.map_index);
                }),
                None => {}
            }
            self.queued.entry(input.address.clone()).or_default().push(input);
        }
    }

    /// All that one node has to give, of one that is not being asked.
    pub fn next(&mut self) -> Option<(String, Vec<MapOutputLocation>)> {
        self.queued.retain(|_, queue| !queue.is_empty());
        let address = self.queued.keys().find(|address| !self.busy.contains(*address))?.clone();
        let inputs = self.queued.remove(&address)?;
        self.taken.extend(inputs.iter().map(|input| input.map_index));
        self.busy.insert(address.clone());
        Some((address, inputs))
    }

    /// The node is not being asked any more.
    pub fn answered(&mut self, address: &str) {
        self.busy.remove(address);
    }

    /// Every output was taken up for fetching.
    pub fn all_taken(&self) -> bool {
        self.taken.len() >= self.maps
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(map_index: u32, attempt: u32, address: &str) -> MapOutputLocation {
        MapOutputLocation { map_index, attempt, node_id: address.into(), address: address.into() }
    }

    fn taken(wanted: &mut Wanted) -> Vec<(u32, u32)> {
        let next = wanted.next().map(|(_, inputs)| inputs).unwrap_or_default();
        next.iter().map(|input| (input.map_index, input.attempt)).collect()
    }

    #[test]
    fn each_map_is_taken_once_wherever_it_is_told_to_be() {
        let mut wanted = Wanted::new(4);
        wanted.add(vec![output(0, 0, "a"), output(1, 0, "b")]);
        assert_eq!(taken(&mut wanted), [(0, 0)]);
        // Told again, and of more on a node that is being asked.
        wanted.add(vec![output(0, 0, "a"), output(0, 1, "c"), output(2, 0, "a")]);
        assert_eq!(taken(&mut wanted), [(1, 0)]);
        assert_eq!(taken(&mut wanted), [], "one question at a time to a node");
        wanted.answered("a");
        assert_eq!(taken(&mut wanted), [(2, 0)]);
        assert!(!wanted.all_taken());
        wanted.add(vec![output(3, 0, "d")]);
        assert_eq!(taken(&mut wanted), [(3, 0)]);
        assert!(wanted.all_taken());
    }

    #[test]
    fn an_output_that_was_made_again_is_fetched_where_it_is_now() {
        let mut wanted = Wanted::new(2);
        wanted.add(vec![output(0, 0, "a"), output(1, 0, "a")]);
        wanted.add(vec![output(0, 1, "b")]);
        assert_eq!(taken(&mut wanted), [(1, 0)]);
        assert_eq!(taken(&mut wanted), [(0, 1)]);
        assert!(wanted.all_taken());
    }
}
