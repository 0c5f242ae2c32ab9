//! Which storages get a block: HDFS's default policy.
//!
//! First replica on the writer's node if it is a datanode, else on a random good one; second on another rack; third on the
//! second's rack, another node; more at random. No node twice; no more than `floor((n-1)/racks)+2` in a rack. Nodes are
//! drawn with a weight of free space over transfers in flight. With fewer good nodes than replicas fewer are handed out.
//! Nodes that the writer favors come before all that, wherever they are; the rest is placed as if they had been chosen so.

use super::blocks::StorageIndex;
use super::codec::Random;
use super::nodes::{NodeIndex, Nodes};

/// What a placement has to respect.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// How many storages are wanted, beyond `present`.
    pub count: usize,
    /// Bytes that each must have free.
    pub size: u64,
    /// Nodes that hold a replica already, in order of their choice.
    pub present: &'a [NodeIndex],
    /// Nodes that must not be used.
    pub excluded: &'a [NodeIndex],
    /// Nodes that the writer wants, in this order.
    pub favored: &'a [NodeIndex],
    /// The writer's node, if it is a datanode.
    pub local: Option<NodeIndex>,
    /// Last sign of life before which a node is stale (turn time).
    pub fresh_since_ms: u64,
    /// Nodes with this many repairs under way take no more; `None`: not asked.
    pub repair_cap: Option<u32>,
}

struct Candidate<'a> {
    node: NodeIndex,
    storage: StorageIndex,
    rack: &'a str,
    weight: u64,
}

/// Most replicas of `n` in one of `racks` racks. With more than one rack never all of them.
pub fn rack_cap(n: usize, racks: usize) -> usize {
    if racks <= 1 || n <= 1 {
        return n.max(1);
    }
    let cap = (n - 1) / racks + 2;
    // HDFS: two racks and three replicas would otherwise allow all three in one.
    if cap >= n && n > 2 { n - 1 } else { cap.min(n) }
}

/// The storage of a node that suits best: most free bytes, the earlier one on a tie.
fn storage_of(nodes: &Nodes, node: NodeIndex, size: u64) -> Option<(StorageIndex, u64)> {
    let mut best: Option<(StorageIndex, u64)> = None;
    for index in &nodes.node(node).storages {
        let storage = nodes.storage(*index);
        let free = storage.remaining.saturating_sub(storage.promised);
        if !storage.failed && free >= size && best.is_none_or(|(_, most)| free > most) {
            best = Some((*index, free));
        }
    }
    best
}

fn candidates<'a>(nodes: &'a Nodes, request: &Request<'_>) -> Vec<Candidate<'a>> {
    let mut found = Vec::new();
    for (index, node) in nodes.nodes.iter().enumerate() {
        let index = index as NodeIndex;
        let usable = node.alive
            && node.registration != 0
            && node.heard_ms >= request.fresh_since_ms
            && request.repair_cap.is_none_or(|cap| node.repairs < cap)
            && !request.present.contains(&index)
            && !request.excluded.contains(&index);
        if !usable {
            continue;
        }
        if let Some((storage, free)) = storage_of(nodes, index, request.size) {
            let capacity = nodes.storage(storage).capacity.max(1);
            let share = ((u128::from(free.min(capacity)) << 20) / u128::from(capacity)) as u64 + 1;
            let weight = share / (1 + u64::from(node.load())) + 1;
            found.push(Candidate { node: index, storage, rack: &node.rack, weight });
        }
    }
    found
}

fn draw(pool: &[Candidate<'_>], random: &mut Random, fits: impl Fn(&Candidate<'_>) -> bool) -> Option<usize> {
    let total: u64 = pool.iter().filter(|candidate| fits(candidate)).map(|candidate| candidate.weight).sum();
    if total == 0 {
        return None;
    }
    let mut ticket = random.below(total);
    for (at, candidate) in pool.iter().enumerate().filter(|(_, candidate)| fits(candidate)) {
        if ticket < candidate.weight {
            return Some(at);
        }
        ticket -= candidate.weight;
    }
    None
}

/// Chooses storages; may be fewer than asked for, or none.
pub fn choose(nodes: &Nodes, request: &Request<'_>, random: &mut Random) -> Vec<StorageIndex> {
    let mut pool = candidates(nodes, request);
    let mut racks: Vec<&str> = pool.iter().map(|candidate| candidate.rack).collect();
    let mut chosen: Vec<(NodeIndex, &str)> =
        request.present.iter().map(|node| (*node, &*nodes.node(*node).rack)).collect();
    racks.extend(chosen.iter().map(|(_, rack)| *rack));
    racks.sort_unstable();
    racks.dedup();
    let cap = rack_cap(request.count + chosen.len(), racks.len());
    let mut storages = Vec::with_capacity(request.count);
    while storages.len() < request.count {
        let room = |candidate: &Candidate<'_>| chosen.iter().filter(|(_, rack)| *rack == candidate.rack).count() < cap;
        let favored = request.favored.iter().find_map(|node| pool.iter().position(|one| one.node == *node));
        let pick = favored.or_else(|| match &chosen[..] {
            [] => request
                .local
                .and_then(|local| pool.iter().position(|candidate| candidate.node == local))
                .or_else(|| draw(&pool, random, |_| true)),
            [(_, first)] => draw(&pool, random, |candidate| candidate.rack != *first),
            [(_, first), (_, second)] if first == second => draw(&pool, random, |candidate| candidate.rack != *first),
            [(_, first), (_, second)] => {
                // Present replicas of a repair come in any order: either of the two racks will do then.
                let near = if request.present.is_empty() {
                    *second
                } else if random.below(2) == 0 {
                    *first
                } else {
                    *second
                };
                draw(&pool, random, |candidate| candidate.rack == near && room(candidate))
                    // No node is left there: the other of the two, so that the block still lies on exactly two racks.
                    .or_else(|| draw(&pool, random, |c| (c.rack == *first || c.rack == *second) && room(c)))
            }
            _ => None,
        });
        let Some(at) = pick.or_else(|| draw(&pool, random, room)) else { break };
        let candidate = pool.swap_remove(at);
        chosen.push((candidate.node, candidate.rack));
        storages.push(candidate.storage);
    }
    storages
}

/// How many nodes can hold a replica of a block: those `present` that live, and those that could take one, excluded or not.
pub fn usable(nodes: &Nodes, request: &Request<'_>) -> usize {
    let fresh = |node: &&NodeIndex| {
        let node = nodes.node(**node);
        node.alive && node.heard_ms >= request.fresh_since_ms
    };
    let mut present: Vec<NodeIndex> = request.present.iter().filter(fresh).copied().collect();
    present.sort_unstable();
    present.dedup();
    present.len() + candidates(nodes, &Request { excluded: &[], ..*request }).len()
}

/// Orders a new pipeline so that each hop is short: the writer's node first, then rack by rack.
pub fn order_pipeline(nodes: &Nodes, storages: &mut [StorageIndex]) {
    for at in 1..storages.len() {
        let rack = &nodes.node_of(storages[at - 1]).rack;
        if let Some(next) = storages[at..].iter().position(|storage| nodes.node_of(*storage).rack == *rack) {
            storages.swap(at, at + next);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_proto::pb;
    use proptest::prelude::*;

    fn cluster(racks: &[u8]) -> Nodes {
        let mut nodes = Nodes::default();
        for (at, rack) in racks.iter().enumerate() {
            let index = nodes
                .put(&pb::EditRegisterNode {
                    node_id: format!("n{at}"),
                    rack: format!("/r{rack}"),
                    storages: vec![pb::EditStorage { storage_id: format!("s{at}"), storage_type: 0 }],
                    ..Default::default()
                })
                .unwrap();
            let node = nodes.node_mut(index);
            (node.alive, node.registration, node.heard_ms) = (true, 1, 100);
            let storage = nodes.storage_mut(at as u32);
            (storage.capacity, storage.remaining) = (1 << 40, 1 << 39);
        }
        nodes
    }

    fn request(count: usize, local: Option<NodeIndex>) -> Request<'static> {
        Request {
            count,
            size: 1,
            present: &[],
            excluded: &[],
            favored: &[],
            local,
            fresh_since_ms: 50,
            repair_cap: None,
        }
    }

    proptest! {
        #[test]
        fn obeys_the_policy(
            racks in proptest::collection::vec(0u8..5, 1..30),
            count in 1usize..7,
            local in proptest::option::of(0usize..30),
            stale in proptest::collection::vec(0usize..30, 0..6),
            seed in any::<u64>(),
        ) {
            let mut nodes = cluster(&racks);
            for at in stale {
                if let Some(node) = nodes.nodes.get_mut(at) {
                    node.heard_ms = 10;
                }
            }
            let good: Vec<u32> = (0..racks.len() as u32).filter(|at| nodes.node(*at).heard_ms == 100).collect();
            let local = local.map(|at| at as u32).filter(|at| (*at as usize) < racks.len());
            let chosen = choose(&nodes, &request(count, local), &mut Random::new(seed));
            prop_assert_eq!(&chosen, &choose(&nodes, &request(count, local), &mut Random::new(seed)));
            let mut unique = chosen.clone();
            unique.sort_unstable();
            unique.dedup();
            prop_assert_eq!(unique.len(), chosen.len(), "a node twice");
            prop_assert!(chosen.iter().all(|storage| good.contains(storage)), "a stale node");
            prop_assert_eq!(chosen.is_empty(), good.is_empty());
            let mut live: Vec<u8> = good.iter().map(|at| racks[*at as usize]).collect();
            live.sort_unstable();
            live.dedup();
            let cap = rack_cap(count, live.len());
            for rack in &live {
                let used = chosen.iter().filter(|storage| racks[**storage as usize] == *rack).count();
                prop_assert!(used <= cap, "{} in rack {}", used, rack);
            }
            if let (Some(local), Some(first)) = (local, chosen.first()) {
                prop_assert!(!good.contains(&local) || *first == local);
            }
            if live.len() > 1 && chosen.len() > 1 {
                prop_assert_ne!(racks[chosen[0] as usize], racks[chosen[1] as usize]);
            }
            let second_rack = chosen.get(1).map(|storage| racks[*storage as usize]);
            let spare = good.iter().filter(|at| Some(racks[**at as usize]) == second_rack).count();
            if live.len() > 1 && chosen.len() > 2 && spare > 1 {
                prop_assert_eq!(second_rack, Some(racks[chosen[2] as usize]));
            }
        }
    }

    #[test]
    fn favored_nodes_come_first_if_they_can_take_it() {
        let mut nodes = cluster(&[0, 0, 0, 1, 1]);
        nodes.storage_mut(2).remaining = 0;
        for seed in 0..50 {
            let wanted = Request { favored: &[1, 2, 0], ..request(3, Some(4)) };
            let chosen = choose(&nodes, &wanted, &mut Random::new(seed));
            assert!(chosen[..2] == [1, 0] && chosen[2] >= 3, "{chosen:?}");
            let excluded = Request { excluded: &[1], ..wanted };
            assert_eq!(choose(&nodes, &excluded, &mut Random::new(seed))[0], 0);
        }
        assert_eq!(choose(&nodes, &Request { favored: &[1, 0], ..request(2, None) }, &mut Random::new(1)), [1, 0]);
    }

    #[test]
    fn three_replicas_lie_on_exactly_two_racks() {
        let nodes = cluster(&[0, 0, 1, 1, 2, 2]);
        for seed in 0..200 {
            let chosen = choose(&nodes, &request(3, None), &mut Random::new(seed));
            let mut racks: Vec<u32> = chosen.iter().map(|storage| storage / 2).collect();
            racks.sort_unstable();
            racks.dedup();
            assert_eq!((chosen.len(), racks.len()), (3, 2));
        }
    }

    #[test]
    fn full_busy_and_excluded_nodes_are_left_out_or_drawn_less() {
        let mut nodes = cluster(&[0, 0, 0]);
        nodes.storage_mut(0).remaining = 0;
        nodes.node_mut(1).transfers = 50;
        let mut hits = [0; 3];
        for seed in 0..300 {
            hits[choose(&nodes, &request(1, None), &mut Random::new(seed))[0] as usize] += 1;
        }
        assert!(hits[0] == 0 && hits[1] < 40 && hits[2] > 200, "{hits:?}");
        let excluded = Request { excluded: &[1, 2], ..request(1, None) };
        assert!(choose(&nodes, &excluded, &mut Random::new(1)).is_empty());
    }
}
