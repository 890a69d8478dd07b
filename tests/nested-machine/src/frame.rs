//! The protocol between the host and the agent in the nested machine.
//!
//! A message is a little-endian `u32` length, and that many bytes: a `u32` session number, a `u8` kind and the kind's fields.
//! Byte strings have a `u32` length. The host numbers the sessions. Several sessions share one port.

use std::io::{self, Read, Write};

/// Maximum bytes of a message after its length.
pub const MAX_BODY: usize = 1 << 20;

/// Maximum bytes of a stream that one message should carry.
pub const CHUNK: usize = 32 << 10;

/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "ebb.agent";

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec {
    /// The program, found through PATH, and its arguments.
    pub argv: Vec<String>,
    /// Working directory; empty means `/`.
    pub cwd: String,
    /// Variables that are added to the agent's basic environment.
    pub env: Vec<(String, String)>,
    /// Rows and columns of a pseudo-terminal, instead of three pipes.
    pub tty: Option<(u16, u16)>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl Exit {
    /// Returns true for exit code 0.
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }

    /// The exit code that a shell would report: 128 plus the number of a signal.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// Kind and fields of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// To the agent: start a session.
    Exec(Exec),
    /// To the agent: bytes for its standard input.
    Stdin(Vec<u8>),
    /// To the agent: close standard input.
    StdinEof,
    /// To the agent: send this signal to the session's process group.
    Signal(i32),
    /// To the agent: the terminal's new number of rows and columns.
    Resize(u16, u16),
    /// To the agent: kill the session and send nothing more.
    Kill,
    /// To the host, session 0: the agent is ready. The text describes the machine, for the log.
    Hello(String),
    /// To the host: bytes from standard output or the terminal.
    Stdout(Vec<u8>),
    /// To the host: bytes from standard error.
    Stderr(Vec<u8>),
    /// To the host: the process has ended, and all output was sent.
    Exited(Exit),
    /// To the host: why the process could not be started.
    Failed(String),
}

/// A message of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Number of the session.
    pub session: u32,
    /// The content.
    pub frame: Frame,
}

/// Writes one message with one `write`.
///
/// # Errors
/// Those of the writer, and `InvalidInput` for a message over [`MAX_BODY`].
pub fn write_message(to: &mut impl Write, message: &Message) -> io::Result<()> {
    let mut body = Encoder(vec![0; 4]);
    body.u32(message.session);
    encode(&mut body, &message.frame);
    let mut bytes = body.0;
    let length = bytes.len() - 4;
    if length > MAX_BODY {
        let text = format!("message of {length} bytes is over the limit of {MAX_BODY}");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    bytes[..4].copy_from_slice(&(length as u32).to_le_bytes());
    to.write_all(&bytes)?;
    to.flush()
}

/// Reads one message.
///
/// # Errors
/// `UnexpectedEof` at the end of the stream or inside a message. `InvalidData` for a message that is too long, of unknown
/// kind, or not exactly as long as its fields.
pub fn read_message(from: &mut impl Read) -> io::Result<Message> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_BODY {
        return Err(invalid(format!(
            "message of {length} bytes is over the limit of {MAX_BODY}"
        )));
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body)?;
    let mut decoder = Decoder(&body);
    let session = decoder.u32()?;
    let frame = decode(&mut decoder)?;
    if !decoder.0.is_empty() {
        return Err(invalid(format!(
            "{} bytes left after a message",
            decoder.0.len()
        )));
    }
    Ok(Message { session, frame })
}

fn encode(to: &mut Encoder, frame: &Frame) {
    match frame {
        Frame::Exec(exec) => {
            to.u8(1);
            to.u32(exec.argv.len() as u32);
            exec.argv.iter().for_each(|arg| to.bytes(arg.as_bytes()));
            to.bytes(exec.cwd.as_bytes());
            to.u32(exec.env.len() as u32);
            for (name, value) in &exec.env {
                to.bytes(name.as_bytes());
                to.bytes(value.as_bytes());
            }
            let (rows, columns) = exec.tty.unwrap_or_default();
            to.u8(u8::from(exec.tty.is_some()));
            to.u16(rows);
            to.u16(columns);
        }
        Frame::Stdin(bytes) => to.tagged(2, bytes),
        Frame::StdinEof => to.u8(3),
        Frame::Signal(signal) => {
            to.u8(4);
            to.u32(*signal as u32);
        }
        Frame::Resize(rows, columns) => {
            to.u8(5);
            to.u16(*rows);
            to.u16(*columns);
        }
        Frame::Kill => to.u8(6),
        Frame::Hello(text) => to.tagged(16, text.as_bytes()),
        Frame::Stdout(bytes) => to.tagged(17, bytes),
        Frame::Stderr(bytes) => to.tagged(18, bytes),
        Frame::Exited(exit) => {
            let (tag, value) = match exit {
                Exit::Code(code) => (0, *code),
                Exit::Signal(signal) => (1, *signal),
            };
            to.u8(19);
            to.u8(tag);
            to.u32(value as u32);
        }
        Frame::Failed(text) => to.tagged(20, text.as_bytes()),
    }
}

fn decode(from: &mut Decoder<'_>) -> io::Result<Frame> {
    Ok(match from.u8()? {
        1 => Frame::Exec(decode_exec(from)?),
        2 => Frame::Stdin(from.bytes()?.to_vec()),
        3 => Frame::StdinEof,
        4 => Frame::Signal(from.u32()? as i32),
        5 => Frame::Resize(from.u16()?, from.u16()?),
        6 => Frame::Kill,
        16 => Frame::Hello(from.string()?),
        17 => Frame::Stdout(from.bytes()?.to_vec()),
        18 => Frame::Stderr(from.bytes()?.to_vec()),
        19 => match (from.u8()?, from.u32()? as i32) {
            (0, code) => Frame::Exited(Exit::Code(code)),
            (1, signal) => Frame::Exited(Exit::Signal(signal)),
            (tag, _) => return Err(invalid(format!("unknown way to exit {tag}"))),
        },
        20 => Frame::Failed(from.string()?),
        kind => return Err(invalid(format!("unknown message kind {kind}"))),
    })
}

fn decode_exec(from: &mut Decoder<'_>) -> io::Result<Exec> {
    let mut exec = Exec::default();
    for _ in 0..from.u32()? {
        exec.argv.push(from.string()?);
    }
    exec.cwd = from.string()?;
    for _ in 0..from.u32()? {
        exec.env.push((from.string()?, from.string()?));
    }
    let tty = from.u8()? != 0;
    let size = (from.u16()?, from.u16()?);
    exec.tty = tty.then_some(size);
    Ok(exec)
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

struct Encoder(Vec<u8>);

impl Encoder {
    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }
    fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }
    fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }
    fn bytes(&mut self, bytes: &[u8]) {
        self.u32(bytes.len() as u32);
        self.0.extend(bytes);
    }
    fn tagged(&mut self, kind: u8, bytes: &[u8]) {
        self.u8(kind);
        self.bytes(bytes);
    }
}

struct Decoder<'a>(&'a [u8]);

impl<'a> Decoder<'a> {
    fn take(&mut self, length: usize) -> io::Result<&'a [u8]> {
        let Some((taken, rest)) = self.0.split_at_checked(length) else {
            let text = format!("message ends {} bytes early", length - self.0.len());
            return Err(invalid(text));
        };
        self.0 = rest;
        Ok(taken)
    }
    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }
    fn u8(&mut self) -> io::Result<u8> {
        Ok(self.array::<1>()?[0])
    }
    fn u16(&mut self) -> io::Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    fn bytes(&mut self) -> io::Result<&'a [u8]> {
        let length = self.u32()? as usize;
        self.take(length)
    }
    fn string(&mut self) -> io::Result<String> {
        String::from_utf8(self.bytes()?.to_vec())
            .map_err(|_| invalid("text that is not UTF-8".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Frame> {
        let exec = Exec {
            argv: vec!["ls".into(), "-l".into(), String::new()],
            cwd: "/tmp".into(),
            env: vec![("A".into(), "b=c".into())],
            tty: Some((24, 80)),
        };
        vec![
            Frame::Exec(Exec {
                tty: None,
                ..exec.clone()
            }),
            Frame::Exec(exec),
            Frame::Stdin(vec![0, 255, 10]),
            Frame::StdinEof,
            Frame::Signal(15),
            Frame::Resize(50, 132),
            Frame::Kill,
            Frame::Hello("kvm".into()),
            Frame::Stdout(vec![7; CHUNK]),
            Frame::Stderr(vec![]),
            Frame::Exited(Exit::Code(-1)),
            Frame::Exited(Exit::Signal(9)),
            Frame::Failed("no such file".into()),
        ]
    }

    #[test]
    fn every_frame_comes_back() {
        let mut wire = Vec::new();
        for (session, frame) in all().into_iter().enumerate() {
            write_message(
                &mut wire,
                &Message {
                    session: session as u32,
                    frame,
                },
            )
            .unwrap();
        }
        let mut wire = wire.as_slice();
        for (session, frame) in all().into_iter().enumerate() {
            let message = read_message(&mut wire).unwrap();
            assert_eq!(
                message,
                Message {
                    session: session as u32,
                    frame
                }
            );
        }
        assert_eq!(
            read_message(&mut wire).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn a_message_cut_anywhere_is_refused() {
        for frame in all() {
            let mut wire = Vec::new();
            write_message(&mut wire, &Message { session: 1, frame }).unwrap();
            let cuts = (0..wire.len().min(64)).chain([wire.len() - 1]);
            for cut in cuts {
                let error = read_message(&mut &wire[..cut]).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                if cut >= 4 {
                    // A length that agrees with the cut: now the fields are too short.
                    let mut short = wire[..cut].to_vec();
                    short[..4].copy_from_slice(&(cut as u32 - 4).to_le_bytes());
                    let error = read_message(&mut short.as_slice()).unwrap_err();
                    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
                }
            }
        }
    }

    #[test]
    fn oversized_messages_are_refused_both_ways() {
        let message = Message {
            session: 1,
            frame: Frame::Stdin(vec![0; MAX_BODY]),
        };
        let error = write_message(&mut Vec::new(), &message).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        let wire = (MAX_BODY as u32 + 1).to_le_bytes();
        let error = read_message(&mut wire.as_slice()).unwrap_err();
        assert!(error.to_string().contains("over the limit"), "{error}");
    }

    #[test]
    fn unknown_kinds_and_trailing_bytes_are_refused() {
        for body in [&[0, 0, 0, 0, 99][..], &[0, 0, 0, 0, 3, 1]] {
            let mut wire = (body.len() as u32).to_le_bytes().to_vec();
            wire.extend(body);
            let error = read_message(&mut wire.as_slice()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
