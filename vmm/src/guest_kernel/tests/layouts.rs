//! Layouts of blocks, against a model.

use super::*;
use proptest::prelude::*;

/// What one section holds, in order: blocks of an order, free or not.
fn blocks() -> impl Strategy<Value = Vec<(u32, bool)>> {
    prop::collection::vec((0u32..=10, prop::bool::weighted(0.6)), 1..60)
}

/// Lays the blocks out at the next place that fits each. Returns the free ones: first page and end.
fn lay_out(machine: &mut Machine, blocks: &[(u32, bool)]) -> Vec<(u64, u64)> {
    let (mut at, mut free) = (0u64, Vec::new());
    for &(order, is_free) in blocks {
        let head = at.next_multiple_of(1 << order);
        at = head + (1 << order);
        if is_free {
            machine.free(head, order.into());
            free.push((head, at));
        }
    }
    free
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn exactly_what_is_free_is_found(
        blocks in blocks(),
        order in 0u32..=10,
        (first, count) in (0u64..4096, 1u64..4096),
    ) {
        let mut machine = Machine::stock();
        let kernel = accept(&machine);
        let free = lay_out(&mut machine, &blocks);
        let within = pages(first, count);
        let unit = 1u64 << order;
        let is_free = |page: u64, count: u64| {
            free.iter().any(|&(head, end)| head <= page && page + count <= end)
        };
        let units = first.next_multiple_of(unit)..first + count;
        let units = units.step_by(unit as usize).filter(|page| page + unit <= first + count);
        let (expected, used): (Vec<_>, Vec<_>) = units.partition(|&page| is_free(page, unit));
        let found = find(&kernel, &machine.memory, within, order);
        // As reclaim asks again, when no vCPU runs.
        for block in (0..RAM / PAGE / BLOCK).map(|block| pages(block * BLOCK, BLOCK)) {
            for part in found.iter().filter_map(|piece| piece.intersection(block)) {
                prop_assert!(kernel.is_free(&machine.memory, part), "{part:?} of {found:?}");
            }
        }
        let found = found.iter().flat_map(|piece| (piece.start()..piece.end()).step_by((unit * PAGE) as usize));
        prop_assert_eq!(found.map(|gpa| gpa / PAGE).collect::<Vec<_>>(), expected.clone());
        for (page, is_free) in expected.into_iter().map(|page| (page, true)).chain(used.into_iter().map(|page| (page, false))) {
            prop_assert_eq!(kernel.is_free(&machine.memory, pages(page, unit)), is_free);
        }
        prop_assert_eq!(kernel.is_free(&machine.memory, within), is_free(first, count));
    }
}
