# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_ebb_global_optspecs
    string join \n h/help V/version
end

function __fish_ebb_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_ebb_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_ebb_using_subcommand
    set -l cmd (__fish_ebb_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c ebb -n "__fish_ebb_needs_command" -s h -l help -d 'Print help'
complete -c ebb -n "__fish_ebb_needs_command" -s V -l version -d 'Print version'
complete -c ebb -n "__fish_ebb_needs_command" -f -a "run" -d 'Start a guest and stay with it until it ends'
complete -c ebb -n "__fish_ebb_needs_command" -f -a "jail" -d 'Start a guest whose monitor is locked in, and stay with it until nothing is left of it'
complete -c ebb -n "__fish_ebb_needs_command" -f -a "restore" -d 'Start a machine from a snapshot'
complete -c ebb -n "__fish_ebb_needs_command" -f -a "merge" -d 'Make a full snapshot of a difference and the memory files below it'
complete -c ebb -n "__fish_ebb_needs_command" -f -a "firecracker" -d 'Be a drop-in for Firecracker: serve its API, and start the machine that a client asks for'
complete -c ebb -n "__fish_ebb_needs_command" -f -a "ctl" -d 'Control a running machine'
complete -c ebb -n "__fish_ebb_needs_command" -f -a "ps" -d 'List the running machines of this host: those of this user, or all for root'
complete -c ebb -n "__fish_ebb_needs_command" -f -a "top" -d 'Show the machines of this host, live: memory by state, what is taken, kicks, pauses, and what the guests say'
complete -c ebb -n "__fish_ebb_needs_command" -f -a "doctor" -d 'Say whether guests can run here, what is missing, and how to get it'
complete -c ebb -n "__fish_ebb_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c ebb -n "__fish_ebb_using_subcommand run" -l kernel -d 'Guest kernel: a bzImage as distributions ship it, or an ELF vmlinux' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand run" -l kernel-entry -d 'How a bzImage is entered' -r -f -a "auto\t'a bzImage through the ELF inside it when its compression is known (faster, no KASLR), else as it is'
image\t'a bzImage as it is: its own decompressor runs in the guest'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l kernel-cache -d 'Where unpacked kernels are kept, so that the next start takes them from there; ebb/kernels in $XDG_CACHE_HOME or ~/.cache by default' -r
complete -c ebb -n "__fish_ebb_using_subcommand run" -l initramfs -d 'Initial RAM disk' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand run" -l cmdline -d 'Kernel command line, instead of the default, by which the kernel is quiet: its messages take longer than the rest of its start. To see them, give the default without quiet' -r
complete -c ebb -n "__fish_ebb_using_subcommand run" -l cpus -d 'The guest\'s processors' -r -f -a "boot=N\t'Number of vCPUs (1 to 255) [default: 1]'
nested=on|off\t'Let the guest run virtual machines of its own, where the host can (VMX, SVM) [default: off]'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l memory -d 'The guest\'s RAM' -r -f -a "size=SIZE\t'Size (at most 64T, a multiple of 2M) [default: 512M]'
thp=on|off\t'Transparent huge pages; on by default, off with hugepages=on'
hugepages=on|off\t'Pages of 2 MiB from hugetlbfs [default: off]'
prefault=on|off\t'Populate the memory before the guest starts [default: off]'
shared=on|off\t'Memory in memfds of 256 MiB, which other processes can map, instead of private memory [default: off]'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l arena -d 'Memory next to the RAM, /dev/daxN.M in a Linux guest, that the guest frees and reuses without a call. It may be bigger than the host\'s memory. Repeat the option for more arenas' -r -f -a "size=SIZE\t'Size, a multiple of the granule, for instance size=64G (at most 64T)'
granule=SIZE\t'The unit in which the guest frees and reuses memory (a power of two from 2M to 1G) [default: 2M]'
id=NAME\t'Name: letters, digits and hyphens; arena0, arena1 and so on by default'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l transport -d 'How the guest reaches its virtio devices: pci, or mmio where the command line has pci=off' -r -f -a "pci\t'on a PCI bus, with MSI-X (virtio-pci)'
mmio\t'by windows that the ACPI tables declare (virtio-mmio): for kernels without PCI'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l disk -d 'A disk. Repeat the option for more disks: the first is /dev/vda' -r -f -a "path=PATH\t'Raw disk image or block device, for instance path=disk.raw; an empty file is a disk whose content comes later'
readonly=on|off\t'The guest may not write [default: off]'
engine=auto|io_uring|threads\t'How several requests are under way at once (auto: by io_uring where the host lets the monitor use it, else by threads; io_uring: by io_uring; threads: by four threads for each queue) [default: auto]'
queues=N\t'Queues, each with a thread of its own; a guest uses one for each vCPU (1 to 16) [default: 1]'
direct=on|off\t'Read and write past the host\'s cache (O_DIRECT) [default: off]'
bw=SIZE/MS+BURST\t'Limit of the bytes that are read and written: SIZE in MS milliseconds (1000), and once BURST more'
ops=N/MS+BURST\t'Limit of the requests, in the same form'
id=NAME\t'Name in the API; disk0, disk1 and so on by default'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l allow-paths -d 'A folder whose files a client of the API may name as disks while the machine runs, and in which it may write snapshots; / allows all files. Repeat the option for more' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand run" -l net -d 'A network interface on a tap of the host. Repeat the option for more' -r -f -a "tap=NAME\t'Name of the tap, which must exist and be free'
fd=N\t'Instead: number of a descriptor that the monitor inherits, an open tap with IFF_NO_PI and IFF_VNET_HDR (3 to 1048576)'
mac=MAC\t'The guest\'s address, for instance 02:00:00:00:00:01; one that follows from the names of machine and tap by default'
mtu=N\t'Size of the largest packet in bytes that the guest is told; what it takes by itself, 1500, by default (68 to 65521)'
rx_bw=SIZE/MS+BURST\t'Limit of the bytes that the guest receives: SIZE in MS milliseconds (1000), and once BURST more'
rx_ops=N/MS+BURST\t'Limit of the frames that it receives, in the same form'
tx_bw=SIZE/MS+BURST\t'Limit of the bytes that it sends'
tx_ops=N/MS+BURST\t'Limit of the frames that it sends'
id=NAME\t'Name in the API; net0, net1 and so on by default'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l vsock -d 'Streams between programs of the guest and unix sockets of the host' -r -f -a "cid=N\t'The guest\'s number among the host\'s guests, at least 3 (3 to 4294967294)'
path=PATH\t'The socket at which programs of the host ask for the guest\'s ports. Its port N of the host is the socket PATH_N'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l serial -d 'The first serial port: this terminal (Ctrl-A X quits), nothing, or a file for the output, which becomes PATH.1 and begins anew at 64 MiB' -r
complete -c ebb -n "__fish_ebb_using_subcommand run" -l balloon -d 'The balloon, by which a stock guest hands memory back lazily' -r -f -a "size=SIZE\t'What the guest is asked for at the start, at most its memory (at most 64T, a multiple of 4K) [default: 0]'
deflate_on_oom=on|off\t'Let the guest take pages back when it runs out of memory; on with auto=on, else off by default'
statistics=N\t'Seconds between two requests for the guest\'s statistics; 0: never; 1 with auto=on, else 0 by default (at most 65535)'
auto=on|off\t'Let the balloon run itself: it grows, beyond size=, when the host or the monitor\'s cgroup stays short, and shrinks when the guest or nobody needs it [default: off]'
reserve=SIZE\t'With auto=on: what stays available to the guest; an eighth of its memory by default, at least 64M (at most 64T, a multiple of 4K)'
free_page_reporting=on|off\t'Let the guest report free pages by itself; on if reporting= is given'
reporting=eager|lazy\t'When the host gets reported pages; lazy by default (eager: at once, before the report is acknowledged; lazy: when it is short of memory, unless the guest writes to them first)'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l rng -d 'A source of random bytes, /dev/hwrng in a Linux guest' -r -f -a "on\t''
off\t''"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l rng-limits -d 'How many random bytes the guest gets; as many as it wants by default' -r -f -a "bw=SIZE/MS+BURST\t'Limit of the bytes: SIZE in MS milliseconds (1000), and once BURST more'
ops=N/MS+BURST\t'Limit of the requests, in the same form'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l lazy -d 'When the host takes what the guest has freed lazily, and at which cost for the guest' -r -f -a "mode=pressure|eager|age|off\t'When it is taken; age= without mode= means mode=age (pressure: when the host is short of memory; eager: as soon as possible; age: when it has been free for some time; off: on request only) [default: pressure]'
age=N\t'With mode=age: seconds after which it is taken (1 to 1048576) [default: 60]'
pause=N\t'Microseconds for which the vCPUs are kept out of the guest at a time; to come out they have as long before that (1 to 1000000) [default: 100]'
slice=N\t'Number of ranges that are taken in one such pause (1 to 65536) [default: 512]'
share=N\t'Percentage of their time that vCPUs may lose; a pause counts twice, because caches are cold after it (1 to 50) [default: 1]'
free_pages=auto|off\t'Also take memory that is free by the guest kernel\'s own free lists, where they can be read (auto: as soon as the guest\'s kernel has told how they are read; off: never) [default: auto]'
strict=on|off\t'For those who write guest allocators: discard at once, and report accesses to freed memory; allows no other key [default: off]'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l api-socket -d 'Serve the REST API on this unix socket' -r
complete -c ebb -n "__fish_ebb_using_subcommand run" -l metrics-path -d 'Append the counters to this file or FIFO in Firecracker\'s JSON: at the start, each minute, at the end, and on request' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand run" -l metrics-listen -d 'Serve GET /metrics on this address of the loopback interface, for every program of this host' -r
complete -c ebb -n "__fish_ebb_using_subcommand run" -l guardian -d 'Helper processes that free the machine\'s memory and clean up after the monitor\'s end, also when it is killed' -r -f -a "on\t''
off\t''"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l seccomp -d 'Threads may make those system calls only that they need' -r -f -a "on\t'another system call ends the monitor with status 37 and one line that names it'
log\t'another one is made, and the kernel logs it (audit, type 1326)'
off\t'no filter, for debugging'"
complete -c ebb -n "__fish_ebb_using_subcommand run" -l id -d 'Name of the machine: letters, digits and hyphens' -r
complete -c ebb -n "__fish_ebb_using_subcommand run" -l config -d 'Read options from this file, TOML or (with the ending .json) JSON: keys are the names of options. An option on the command line takes precedence over the file' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand run" -l log-file -d 'Write the log to this file instead of standard error' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand run" -l event-monitor -d 'Append what happens to the machine to this file, FIFO or open descriptor, as JSON in lines' -r
complete -c ebb -n "__fish_ebb_using_subcommand run" -l dry-run -d 'Check the options and their files, print the machine that they describe as JSON, and end: nothing is made or started'
complete -c ebb -n "__fish_ebb_using_subcommand run" -s v -d 'Log more: -v for information, -vv for debugging'
complete -c ebb -n "__fish_ebb_using_subcommand run" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c ebb -n "__fish_ebb_using_subcommand jail" -l uid -d 'Number of the unprivileged user that the machine\'s processes run as; one of its own for each machine' -r
complete -c ebb -n "__fish_ebb_using_subcommand jail" -l gid -d 'Number of its group; it has no other group' -r
complete -c ebb -n "__fish_ebb_using_subcommand jail" -l folder -d 'The machine\'s folder, the only place where it makes files: its socket, logs and the serial port\'s output. It is made, and removed at the end if it is empty; /run/ebb/jail/ID by default' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand jail" -l cgroup -d 'The machine\'s cgroup (version 2) and its limits' -r -f -a "parent=PATH\t'The cgroup below which that of the machine is made, with the machine\'s name: a path below the root of all [default: ebb]'
memory_high=SIZE\t'Memory above which the kernel slows the machine down, and Ebb makes room (at most 64T, a multiple of 4K)'
memory_max=SIZE\t'Memory above which the kernel kills (at most 64T, a multiple of 4K)'
cpu_max=N\t'Processor time, in percent of one processor (1 to 1000000)'
pids_max=N\t'Number of threads, those of the helper processes among them (1 to 4194304)'"
complete -c ebb -n "__fish_ebb_using_subcommand jail" -l netns -d 'Look for taps in this network namespace, for instance /run/netns/NAME, instead of the caller\'s. The machine itself has an empty one in either case' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand jail" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l state -d 'The snapshot\'s state file' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l memory -d 'The snapshot\'s memory file. It must stay as it is while the machine runs. For a difference repeat the option: the full one first, then each difference, this one\'s own last' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l page-server -d 'Instead of the memory file, the socket of a page server in Firecracker\'s protocol. It must serve as long as the machine runs' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l api-socket -d 'Serve the REST API on this unix socket' -r
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l disk -d 'Another file for disk number N, the first is 0: a copy that was made at the time of the snapshot' -r
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l tap -d 'Another tap for network interface number N, the first is 0' -r
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l vsock -d 'Another path for the vsock\'s socket' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l serial -d 'Where the first serial port goes, if elsewhere' -r
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l id -d 'Another name of the machine' -r
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l log-file -d 'Write the log to this file instead of standard error' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l event-monitor -d 'Append what happens to the machine to this file, FIFO or open descriptor, as JSON in lines' -r
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l resume -d 'Let the guest run at once'
complete -c ebb -n "__fish_ebb_using_subcommand restore" -l verify -d 'First read all of the memory files and compare their checksums'
complete -c ebb -n "__fish_ebb_using_subcommand restore" -s v -d 'Log more: -v for information, -vv for debugging'
complete -c ebb -n "__fish_ebb_using_subcommand restore" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c ebb -n "__fish_ebb_using_subcommand merge" -l state -d 'The difference\'s state file' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand merge" -l memory -d 'The memory files, the full one first and the difference\'s own last' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand merge" -l to-state -d 'The file for the full snapshot\'s state' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand merge" -l to-memory -d 'The file for the full snapshot\'s memory' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand merge" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l api-sock -d 'Serve the API on this unix socket' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l id -d 'Name of the machine: letters, digits and hyphens' -r
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l config-file -d 'Start the machine that this file describes, in Firecracker\'s JSON' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l log-path -d 'Write the log to this file or FIFO instead of standard error' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l level -d 'What the log holds: Off, Error, Warn, Info, Debug or Trace' -r
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l module -d 'Accepted, without effect' -r
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l metrics-path -d 'Append the counters to this file or FIFO' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l event-monitor -d 'Ebb\'s: append what happens to the machine to this file, FIFO or open descriptor, as JSON in lines' -r
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l seccomp-filter -d 'Accepted, without effect: the filters are Ebb\'s own, for its own threads' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l metadata -d 'Refused: there is no metadata service' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l mmds-size-limit -d 'Accepted, without effect' -r
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l http-api-max-payload-size -d 'Accepted, without effect: a body may have 64 KiB' -r
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l start-time-us -d 'Accepted, without effect' -r
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l start-time-cpu-us -d 'Accepted, without effect' -r
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l parent-cpu-time-us -d 'Accepted, without effect' -r
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l describe-snapshot -d 'Print the version of this snapshot\'s state file' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l no-api -d 'Serve no API; only with --config-file'
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l show-level -d 'Accepted: lines always have their level'
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l show-log-origin -d 'Accepted: lines always say where they come from'
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l no-seccomp -d 'Threads may make all system calls'
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l enable-pci -d 'Devices are on a PCI bus, with MSI-X'
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l boot-timer -d 'Accepted, without effect: there is no timer device'
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -l snapshot-version -d 'Print the version of the snapshots that are made and loaded; they are Ebb\'s own'
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -s V -l version -d 'Print the version of Firecracker whose API this is, and Ebb\'s'
complete -c ebb -n "__fish_ebb_using_subcommand firecracker" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -l api-socket -d 'Path of the socket, as given to `ebb run --api-socket`' -r
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "status" -d 'Show the state of the machine, its balloon and its lazily free memory'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "balloon" -d 'Show the balloon, or set its size: how much the guest should hand back, in whole MiB'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "reclaim" -d 'Return up to this much lazily freed memory to the host now'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "teardown" -d 'Show how memory will be freed at the end, or change it: workers=N, batch=SIZE'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "pause" -d 'Pause the machine: no vCPU runs and no device uses its memory until it is resumed'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "resume" -d 'Let a paused machine run again'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "disk" -d 'Show the disks, or have one take on the size that its file has now, or another file'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "snapshot" -d 'Save the machine to two new files, from which `ebb restore` starts it; it is paused meanwhile'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "stop" -d 'End the machine'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "shutdown" -d 'Ask the guest to shut down, by Ctrl-Alt-Del, and wait; end the machine if it does not'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "wait" -d 'Wait until the machine has ended'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and not __fish_seen_subcommand_from status balloon reclaim teardown pause resume disk snapshot stop shutdown wait help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from status" -l json -d 'Print one JSON object'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from status" -s h -l help -d 'Print help'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from balloon" -s h -l help -d 'Print help'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from reclaim" -s h -l help -d 'Print help'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from teardown" -s h -l help -d 'Print help'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from pause" -s h -l help -d 'Print help'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from resume" -s h -l help -d 'Print help'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from disk" -l path -d 'The file that it shall be on, in a folder that `ebb run --allow-paths` names' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from disk" -s h -l help -d 'Print help'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from snapshot" -l state -d 'The file for the state' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from snapshot" -l memory -d 'The file for the memory' -r -F
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from snapshot" -l diff -d 'Save only what is new since the machine was restored; to restore it takes the memory files of then, too'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from snapshot" -s h -l help -d 'Print help'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from stop" -s h -l help -d 'Print help'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from shutdown" -l timeout -d 'How long the guest may take, in seconds' -r
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from shutdown" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from wait" -l memory-free -d 'Wait until its memory is free, too; works also for a machine that has ended already'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from wait" -s h -l help -d 'Print help'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "status" -d 'Show the state of the machine, its balloon and its lazily free memory'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "balloon" -d 'Show the balloon, or set its size: how much the guest should hand back, in whole MiB'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "reclaim" -d 'Return up to this much lazily freed memory to the host now'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "teardown" -d 'Show how memory will be freed at the end, or change it: workers=N, batch=SIZE'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "pause" -d 'Pause the machine: no vCPU runs and no device uses its memory until it is resumed'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "resume" -d 'Let a paused machine run again'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "disk" -d 'Show the disks, or have one take on the size that its file has now, or another file'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "snapshot" -d 'Save the machine to two new files, from which `ebb restore` starts it; it is paused meanwhile'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "stop" -d 'End the machine'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "shutdown" -d 'Ask the guest to shut down, by Ctrl-Alt-Del, and wait; end the machine if it does not'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "wait" -d 'Wait until the machine has ended'
complete -c ebb -n "__fish_ebb_using_subcommand ctl; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c ebb -n "__fish_ebb_using_subcommand ps" -l json -d 'Print one JSON list, with all that is known of each'
complete -c ebb -n "__fish_ebb_using_subcommand ps" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c ebb -n "__fish_ebb_using_subcommand top" -l interval -d 'Seconds between two looks, 1 to 3600' -r
complete -c ebb -n "__fish_ebb_using_subcommand top" -l once -d 'Print one picture, with the rates of one interval, and end'
complete -c ebb -n "__fish_ebb_using_subcommand top" -l json -d 'Print one JSON list instead, as `ebb ps --json`'
complete -c ebb -n "__fish_ebb_using_subcommand top" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c ebb -n "__fish_ebb_using_subcommand doctor" -l json -d 'Print one JSON object'
complete -c ebb -n "__fish_ebb_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c ebb -n "__fish_ebb_using_subcommand help; and not __fish_seen_subcommand_from run jail restore merge firecracker ctl ps top doctor help" -f -a "run" -d 'Start a guest and stay with it until it ends'
complete -c ebb -n "__fish_ebb_using_subcommand help; and not __fish_seen_subcommand_from run jail restore merge firecracker ctl ps top doctor help" -f -a "jail" -d 'Start a guest whose monitor is locked in, and stay with it until nothing is left of it'
complete -c ebb -n "__fish_ebb_using_subcommand help; and not __fish_seen_subcommand_from run jail restore merge firecracker ctl ps top doctor help" -f -a "restore" -d 'Start a machine from a snapshot'
complete -c ebb -n "__fish_ebb_using_subcommand help; and not __fish_seen_subcommand_from run jail restore merge firecracker ctl ps top doctor help" -f -a "merge" -d 'Make a full snapshot of a difference and the memory files below it'
complete -c ebb -n "__fish_ebb_using_subcommand help; and not __fish_seen_subcommand_from run jail restore merge firecracker ctl ps top doctor help" -f -a "firecracker" -d 'Be a drop-in for Firecracker: serve its API, and start the machine that a client asks for'
complete -c ebb -n "__fish_ebb_using_subcommand help; and not __fish_seen_subcommand_from run jail restore merge firecracker ctl ps top doctor help" -f -a "ctl" -d 'Control a running machine'
complete -c ebb -n "__fish_ebb_using_subcommand help; and not __fish_seen_subcommand_from run jail restore merge firecracker ctl ps top doctor help" -f -a "ps" -d 'List the running machines of this host: those of this user, or all for root'
complete -c ebb -n "__fish_ebb_using_subcommand help; and not __fish_seen_subcommand_from run jail restore merge firecracker ctl ps top doctor help" -f -a "top" -d 'Show the machines of this host, live: memory by state, what is taken, kicks, pauses, and what the guests say'
complete -c ebb -n "__fish_ebb_using_subcommand help; and not __fish_seen_subcommand_from run jail restore merge firecracker ctl ps top doctor help" -f -a "doctor" -d 'Say whether guests can run here, what is missing, and how to get it'
complete -c ebb -n "__fish_ebb_using_subcommand help; and not __fish_seen_subcommand_from run jail restore merge firecracker ctl ps top doctor help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c ebb -n "__fish_ebb_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "status" -d 'Show the state of the machine, its balloon and its lazily free memory'
complete -c ebb -n "__fish_ebb_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "balloon" -d 'Show the balloon, or set its size: how much the guest should hand back, in whole MiB'
complete -c ebb -n "__fish_ebb_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "reclaim" -d 'Return up to this much lazily freed memory to the host now'
complete -c ebb -n "__fish_ebb_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "teardown" -d 'Show how memory will be freed at the end, or change it: workers=N, batch=SIZE'
complete -c ebb -n "__fish_ebb_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "pause" -d 'Pause the machine: no vCPU runs and no device uses its memory until it is resumed'
complete -c ebb -n "__fish_ebb_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "resume" -d 'Let a paused machine run again'
complete -c ebb -n "__fish_ebb_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "disk" -d 'Show the disks, or have one take on the size that its file has now, or another file'
complete -c ebb -n "__fish_ebb_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "snapshot" -d 'Save the machine to two new files, from which `ebb restore` starts it; it is paused meanwhile'
complete -c ebb -n "__fish_ebb_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "stop" -d 'End the machine'
complete -c ebb -n "__fish_ebb_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "shutdown" -d 'Ask the guest to shut down, by Ctrl-Alt-Del, and wait; end the machine if it does not'
complete -c ebb -n "__fish_ebb_using_subcommand help; and __fish_seen_subcommand_from ctl" -f -a "wait" -d 'Wait until the machine has ended'
