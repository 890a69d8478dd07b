use std::os::fd::AsFd;

use ebb_core::release::Release;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;

const MIB: u64 = 1 << 20;
/// Pages of the RAM of [`Machine`], which is in two regions.
const PAGES: u64 = 5 * 256;

fn regions() -> [GpaRange; 2] {
    let region = |start, end| GpaRange::new(start * MIB, end * MIB).unwrap();
    [region(0, 2), region(16, 19)]
}

fn page(number: u64) -> GpaRange {
    let mut page = ranges(&kept_part(0, number, 1), &regions()).collect::<Vec<_>>();
    page.pop().unwrap()
}

fn kept_part(layer: usize, first: u64, pages: u64) -> Kept {
    Kept {
        layer,
        first,
        pages,
    }
}

/// A machine's memory, the files that it was restored from, and what has to be in it.
struct Machine {
    ram: GuestRam,
    files: Vec<Arc<File>>,
    base: Option<MemoryMap>,
    content: Vec<u8>,
    dead: Vec<bool>,
    saved: u8,
    /// Most parts that a difference keeps.
    most: usize,
}

impl Machine {
    fn new() -> Self {
        Self {
            ram: GuestRam::allocate(Backing::default(), &regions()).unwrap(),
            files: Vec::new(),
            base: None,
            content: vec![0; PAGES as usize],
            dead: vec![false; PAGES as usize],
            saved: 0,
            most: MAX_KEPT,
        }
    }

    fn write(&mut self, number: u64, byte: u8) {
        let page_of = [byte; PAGE_SIZE as usize];
        let at = GuestAddress(page(number).start());
        self.ram.view().write_slice(&page_of, at).unwrap();
        self.content[number as usize] = byte;
        self.dead[number as usize] = false;
    }

    fn read(&self, number: u64) -> u8 {
        let at = GuestAddress(page(number).end() - 1);
        self.ram.view().read_obj(at).unwrap()
    }

    /// The host takes a page.
    fn discard(&mut self, number: u64) {
        self.ram
            .release_range(page(number), Release::Discard)
            .unwrap();
        self.content[number as usize] = 0;
    }

    fn dead(&self) -> Vec<GpaRange> {
        let dead = (0..).zip(&self.dead).filter(|(_, is_dead)| **is_dead);
        let mut dead = dead.map(|(number, _)| page(number)).collect();
        merge(&mut dead);
        dead
    }

    /// Saves it, as a difference if `is_difference` and it was restored. What is written.
    fn save(&mut self, is_difference: bool) -> (File, MemoryMap) {
        self.saved += 1;
        let (file, id) = (tempfile::tempfile().unwrap(), [self.saved; 16]);
        let (ram, dead) = (&self.ram, self.dead());
        let map = match &self.base {
            Some(base) if is_difference => {
                let difference = Difference {
                    most: self.most,
                    ..Difference::new(base, &self.files)
                };
                difference.write(&file, ram, &dead, id, || false)
            }
            _ => memory::write(&file, ram, &dead, id, || false),
        };
        let map = map.unwrap();
        assert!(map.is_sound());
        (file, map)
    }

    /// Goes on from what was saved. What was dead is zero then.
    fn restore(&mut self, (file, map): (File, MemoryMap)) {
        self.files.truncate(map.below.len());
        self.files.push(Arc::new(file));
        let mut ram = GuestRam::allocate(Backing::default(), &regions()).unwrap();
        for (index, file) in self.files.iter().enumerate() {
            map.check(index, file, true).unwrap();
        }
        for (file, range) in map.parts(&regions()) {
            ram.map_file(self.files[file].as_fd(), &[range]).unwrap();
        }
        (self.ram, self.base) = (ram, Some(map));
        let dead = self.dead.iter().zip(&mut self.content);
        dead.filter(|(dead, _)| **dead)
            .for_each(|(_, byte)| *byte = 0);
        for number in 0..PAGES {
            assert_eq!(self.read(number), self.content[number as usize], "{number}");
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// Pages from the first on get this byte.
    Write(u64, u64, u8),
    /// Their content is dead, and the host takes it or not.
    Free(u64, u64, bool),
    /// Their content counts again, whatever it is.
    Reuse(u64, u64),
    /// The machine is saved and goes on.
    Save(bool),
    /// It is saved, and restored.
    Restore(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let pages = || (0..PAGES, prop_oneof![Just(1), 1..20_u64, 1..PAGES]);
    prop_oneof![
        4 => (pages(), 0..4_u8).prop_map(|((first, count), byte)| Step::Write(first, count, byte)),
        3 => (pages(), any::<bool>()).prop_map(|((first, count), take)| Step::Free(first, count, take)),
        1 => pages().prop_map(|(first, count)| Step::Reuse(first, count)),
        1 => any::<bool>().prop_map(Step::Save),
        2 => prop::bool::weighted(0.8).prop_map(Step::Restore),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_chain_of_snapshots_is_what_the_memory_was(
        steps in prop::collection::vec(step(), 1..25),
        most in prop_oneof![Just(MAX_KEPT), 0..20_usize],
    ) {
        let mut machine = Machine::new();
        machine.most = most;
        for step in steps {
            match step {
                Step::Write(first, count, byte) => {
                    (first..PAGES.min(first + count)).for_each(|it| machine.write(it, byte));
                }
                Step::Free(first, count, take) => for number in first..PAGES.min(first + count) {
                    machine.dead[number as usize] = true;
                    if take {
                        machine.discard(number);
                    }
                },
                Step::Reuse(first, count) => {
                    let reused = machine.dead.iter_mut().skip(first as usize);
                    reused.take(count as usize).for_each(|dead| *dead = false);
                }
                Step::Save(is_difference) => drop(machine.save(is_difference)),
                Step::Restore(is_difference) => {
                    let saved = machine.save(is_difference);
                    machine.restore(saved);
                }
            }
        }
        let saved = machine.save(true);
        machine.restore(saved);
    }
}

#[test]
fn a_difference_holds_what_was_written_and_nothing_that_is_dead() {
    let mut machine = Machine::new();
    (0..PAGES).for_each(|number| machine.write(number, 1));
    let full = machine.save(false);
    assert_eq!(full.1.written, PAGES * PAGE_SIZE);
    machine.restore(full);
    machine.write(3, 2);
    machine.write(700, 0);
    for number in 10..20 {
        machine.dead[number] = true;
    }
    machine.dead[800] = true;
    machine.discard(800);
    let difference = machine.save(true);
    assert_eq!(difference.1.written, PAGE_SIZE);
    let kept: Vec<_> = difference
        .1
        .kept
        .iter()
        .map(|it| (it.first, it.pages))
        .collect();
    let due = [(0, 3), (4, 6), (20, 680), (701, 99), (801, PAGES - 801)];
    assert_eq!(kept, due);
    machine.restore(difference);
    let bytes = [0, 3, 9, 10, 19, 20, 700, 800].map(|number| machine.read(number));
    assert_eq!(bytes, [1, 2, 1, 0, 0, 1, 0, 0]);
    // Nothing was written since then, so another one holds nothing. What is dead still is no content below.
    let again = machine.save(true);
    assert_eq!((again.1.written, again.1.files()), (0, 3));
    let pages: u64 = again.1.kept.iter().map(|it| it.pages).sum();
    assert_eq!(
        pages,
        PAGES - 2,
        "all but 700 and 800, which are in no file"
    );
    let whole = tempfile::tempfile().unwrap();
    machine.restore(again);
    let map = flatten(
        machine.base.as_ref().unwrap(),
        &machine.files,
        &whole,
        [9; 16],
    )
    .unwrap();
    // All but 3 and 700, which were written anew, 10 to 19, and 800; and page 3.
    assert_eq!((map.written, map.files()), ((PAGES - 12) * PAGE_SIZE, 1));
    machine.restore((whole, map));
}

#[test]
fn a_file_that_is_not_the_one_below_is_refused() {
    let mut machine = Machine::new();
    machine.write(0, 1);
    let (other, _) = machine.save(false);
    let full = machine.save(false);
    machine.restore(full);
    let (_, map) = machine.save(true);
    map.check(0, &machine.files[0], true).unwrap();
    let error = map.check(0, &other, false).unwrap_err();
    assert!(matches!(error, memory::MemoryFileError::Other), "{error}");
    map.check(2, &other, false).unwrap_err();
}

#[test]
fn a_guest_cannot_make_more_parts_than_can_be_mapped() {
    let mut keeper = Keeper::new(100);
    // Every other page, and a large part among them.
    let scattered = (0..10_000).map(|at| kept_part(0, at * 2, 1));
    let large = kept_part(0, 20_000, 1001);
    let more = (0..10_000).map(|at| kept_part(0, 30_000 + at * 2, 1));
    scattered
        .chain([large])
        .chain(more)
        .for_each(|it| keeper.add(it));
    let kept = keeper.finish();
    assert!(kept.len() <= 100);
    assert!(kept.contains(&kept_part(0, 20_000, 1000)), "{kept:?}");
}

#[test]
fn what_cannot_be_is_not_sound() {
    let below = vec![Layer::default(); 2];
    let sound = |kept: &[Kept]| {
        let map = MemoryMap {
            len: 11 * PAGE_SIZE,
            below: below.clone(),
            kept: kept.to_vec(),
            ..MemoryMap::default()
        };
        map.is_sound()
    };
    let part = kept_part;
    assert!(sound(&[part(1, 0, 3), part(0, 3, 7)]));
    for kept in [
        [part(1, 0, 3), part(0, 2, 7)],
        [part(1, 0, 3), part(0, 3, 8)],
        [part(2, 0, 3), part(0, 3, 1)],
        [part(0, 0, 0), part(0, 3, 1)],
        [part(0, 0, 1), part(0, u64::MAX, u64::MAX)],
    ] {
        assert!(!sound(&kept), "{kept:?}");
    }
    assert!(!sound(&vec![part(0, 0, 1); MAX_KEPT + 1]));
}
