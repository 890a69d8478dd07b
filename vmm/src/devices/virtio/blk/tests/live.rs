//! What an operator changes while the guest works.

use std::fs;
use std::sync::atomic::Ordering;

use super::*;

#[test]
fn the_guest_hears_of_another_size_and_what_is_gone_fails() {
    let rig = Rig::new(false);
    let (path, handle) = (rig.dir.path().join("disk"), rig.block.handle());
    let told = || rig.interrupt.config.load(Ordering::SeqCst);
    let sectors = || {
        let mut data = [0; 8];
        rig.block.read_config(0, &mut data);
        u64::from_le_bytes(data)
    };
    assert_eq!(rig.request(IN, SECTORS, 512).0, STATUS_IOERR);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(2 * SECTORS * 512).unwrap();
    assert_eq!(sectors(), SECTORS, "nobody has looked");
    handle.measure().unwrap();
    assert_eq!((sectors(), told()), (2 * SECTORS, 1));
    assert_eq!(rig.request(IN, SECTORS, 512).0, STATUS_OK);
    file.set_len(1000).unwrap();
    let odd = handle.measure().unwrap_err().to_string();
    assert!(odd.contains("is 1000 bytes"), "{odd}");
    assert_eq!((sectors(), told()), (2 * SECTORS, 1));
    file.set_len(1024).unwrap();
    handle.measure().unwrap();
    assert_eq!((sectors(), handle.bytes(), told()), (2, 1024, 2));
    assert_eq!(rig.request(IN, 2, 512).0, STATUS_IOERR);
    assert_eq!(rig.request(IN, 1, 512).0, STATUS_OK);
}

#[test]
fn another_file_takes_the_place_of_one_that_is_free_then() {
    for engine in ENGINES {
        let rig = Rig::with(|config| {
            fs::write(&config.path, []).unwrap();
            config.engine = engine;
        });
        assert_eq!(rig.request(IN, 0, 512).0, STATUS_IOERR, "empty");
        let handle = rig.block.handle();
        let path = |name: &str| rig.dir.path().join(name);
        fs::write(path("other"), content()).unwrap();
        let open = |name: &str| {
            let mut options = fs::OpenOptions::new();
            options.read(true).write(true).open(path(name)).unwrap()
        };
        // Requests come all the time.
        for first in [0, 3, 6, 9] {
            rig.offer(first, IN, 0, (DATA, 512));
        }
        rig.queue.notify();
        handle.exchange(open("other"), &path("other")).unwrap();
        wait_for(|| rig.queue.used_index() == 5, "answers");
        rig.assert_alive();
        assert_eq!(handle.path(), path("other"));
        assert_eq!(rig.interrupt.config.load(Ordering::SeqCst), 1);
        // The first one is free, the second one is not.
        Disk::open(&config(path("disk"), false)).unwrap();
        let taken = Disk::open(&config(path("other"), false)).unwrap_err();
        assert!(matches!(taken, DiskError::Locked { .. }), "{taken}");
        // What is no disk changes nothing.
        fs::write(path("odd"), [0; 100]).unwrap();
        let refused = handle.exchange(open("odd"), &path("odd")).unwrap_err();
        assert!(refused.to_string().contains("is 100 bytes"), "{refused}");
        rig.assert_alive();
    }
}

#[test]
fn limits_can_be_set_while_the_disk_works() {
    let rig = Rig::with(|config| config.ops = Some("1/86400000".parse().unwrap()));
    rig.assert_alive();
    rig.header(IN, 2);
    let chain = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
    rig.queue.offer_chain(0, &chain);
    rig.queue.notify();
    let handle = rig.block.handle();
    wait_for(|| handle.stats().throttled_total > 0, "limit");
    handle.limit(None, "0".parse().ok());
    rig.queue.run_until_used(2);
    rig.assert_alive();
}
