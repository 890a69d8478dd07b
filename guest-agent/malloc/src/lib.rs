//! `libebb_malloc.so`: replaces malloc(3) by that of `ebb-heap`, for LD_PRELOAD; and fork(3), madvise(2) and prctl(2), which
//! mean something else to a heap in an arena.

use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::ptr::null_mut;

use libc::{EINVAL, ENOMEM, size_t};

const PAGE_SIZE: usize = 4096;

fn fail(code: c_int) -> *mut c_void {
    // SAFETY: the thread's own errno.
    unsafe { *libc::__errno_location() = code };
    null_mut()
}

/// malloc(3).
///
/// # Safety
/// As malloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc(size: size_t) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::malloc(size) }
}

/// calloc(3).
///
/// # Safety
/// As calloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn calloc(count: size_t, size: size_t) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::calloc(count, size) }
}

/// realloc(3).
///
/// # Safety
/// As realloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn realloc(memory: *mut c_void, size: size_t) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::realloc(memory, size) }
}

/// reallocarray(3).
///
/// # Safety
/// As reallocarray(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn reallocarray(
    memory: *mut c_void,
    count: size_t,
    size: size_t,
) -> *mut c_void {
    match count.checked_mul(size) {
        // SAFETY: the caller's promise.
        Some(total) => unsafe { ebb_heap::realloc(memory, total) },
        None => fail(ENOMEM),
    }
}

/// free(3).
///
/// # Safety
/// As free(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn free(memory: *mut c_void) {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::free(memory) }
}

/// posix_memalign(3).
///
/// # Safety
/// As posix_memalign(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_memalign(
    memory: *mut *mut c_void,
    align: size_t,
    size: size_t,
) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::posix_memalign(memory, align, size) }
}

/// aligned_alloc(3).
///
/// # Safety
/// As aligned_alloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aligned_alloc(align: size_t, size: size_t) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::aligned_alloc(align, size) }
}

/// memalign(3).
///
/// # Safety
/// As memalign(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn memalign(align: size_t, size: size_t) -> *mut c_void {
    let Some(align) = align.checked_next_power_of_two() else {
        return fail(EINVAL);
    };
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::aligned_alloc(align.max(size_of::<usize>()), size) }
}

/// valloc(3).
///
/// # Safety
/// As valloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn valloc(size: size_t) -> *mut c_void {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::aligned_alloc(PAGE_SIZE, size) }
}

/// pvalloc(3).
///
/// # Safety
/// As pvalloc(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pvalloc(size: size_t) -> *mut c_void {
    match size.checked_next_multiple_of(PAGE_SIZE) {
        // SAFETY: the caller's promise.
        Some(size) => unsafe { ebb_heap::aligned_alloc(PAGE_SIZE, size) },
        None => fail(ENOMEM),
    }
}

/// malloc_usable_size(3).
///
/// # Safety
/// As malloc_usable_size(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn malloc_usable_size(memory: *mut c_void) -> size_t {
    // SAFETY: the caller's promise.
    unsafe { ebb_heap::usable_size(memory) }
}

/// prctl(2), but PR_SET_THP_DISABLE succeeds without effect if the heap is in an arena.
///
/// device-dax has huge pages only: without them an access fails with SIGBUS. Redis disables them to make its forks cheaper,
/// which does not matter here, because there are none.
///
/// # Safety
/// As prctl(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn prctl(
    option: c_int,
    second: c_ulong,
    third: c_ulong,
    fourth: c_ulong,
    fifth: c_ulong,
) -> c_int {
    if option == libc::PR_SET_THP_DISABLE && ebb_heap::uses_arena() {
        return 0;
    }
    // SAFETY: the caller's promise.
    unsafe { libc::syscall(libc::SYS_prctl, option, second, third, fourth, fifth) as c_int }
}

/// madvise(2), but MADV_DONTNEED zeroes memory of the heap, as it does normal memory.
///
/// # Safety
/// As madvise(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(start: *mut c_void, len: size_t, advice: c_int) -> c_int {
    // SAFETY: the caller's promise.
    let done = unsafe { ebb_heap::advise(start, len, advice) };
    // Not by libc's function, because looking that up may allocate.
    // SAFETY: the caller's promise.
    done.unwrap_or_else(|| unsafe { libc::syscall(libc::SYS_madvise, start, len, advice) as c_int })
}

/// Calls the C library's function of this name, unless this process cannot fork: then fails with ENOSYS.
macro_rules! unless_fork_is_refused {
    ($name:ident($($argument:ident: $type:ty),*)) => {{
        if ebb_heap::fork::is_refused() {
            return -1;
        }
        let name = concat!(stringify!($name), "\0").as_ptr().cast();
        // SAFETY: looks up a function of this type, and passes on what the caller promises.
        unsafe {
            let function = libc::dlsym(libc::RTLD_NEXT, name);
            assert!(!function.is_null(), "{} is not in the C library", stringify!($name));
            let function: unsafe extern "C" fn($($type),*) -> c_int = std::mem::transmute(function);
            function($($argument),*)
        }
    }};
}

/// fork(3).
#[unsafe(no_mangle)]
pub extern "C" fn fork() -> c_int {
    unless_fork_is_refused!(fork())
}

/// _Fork(3).
#[unsafe(no_mangle)]
pub extern "C" fn _Fork() -> c_int {
    unless_fork_is_refused!(_Fork())
}

/// daemon(3).
#[unsafe(no_mangle)]
pub extern "C" fn daemon(stay: c_int, keep: c_int) -> c_int {
    unless_fork_is_refused!(daemon(stay: c_int, keep: c_int))
}

/// forkpty(3).
///
/// # Safety
/// As forkpty(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn forkpty(
    master: *mut c_int,
    name: *mut c_char,
    terminal: *const c_void,
    window: *const c_void,
) -> c_int {
    unless_fork_is_refused!(forkpty(
        master: *mut c_int, name: *mut c_char, terminal: *const c_void, window: *const c_void
    ))
}
