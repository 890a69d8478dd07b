//! `--balloon`.

use clap::ArgAction::Set;
use clap::Args;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use ebb_core::release::Release;

use super::ConfigError;
use super::keys::{Keys, on_off};
use super::limits::MAX_MEMORY;
use super::number::{number, size};

/// `--balloon`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(rename_all = "snake_case")]
pub struct BalloonSpec {
    /// What the guest is asked for at the start, at most its memory
    #[arg(long, value_parser = size(0..=MAX_MEMORY, 4096), default_value = "0")]
    pub size: u64,
    /// Let the guest take pages back when it runs out of memory; on with auto=on, else off by default
    #[arg(long, value_parser = on_off())]
    pub deflate_on_oom: Option<bool>,
    /// Seconds between two requests for the guest's statistics; 0: never; 1 with auto=on, else 0 by default
    #[arg(long, value_parser = number::<u16>(0..=u16::MAX as u64))]
    pub statistics: Option<u16>,
    /// Let the balloon run itself: it grows, beyond size=, when the host or the monitor's cgroup stays short, and shrinks when the guest or nobody needs it
    #[arg(long, action = Set, value_parser = on_off(), default_value = "off")]
    pub auto: bool,
    /// With auto=on: what stays available to the guest; an eighth of its memory by default, at least 64M
    #[arg(long, value_parser = size(0..=MAX_MEMORY, 4096))]
    pub reserve: Option<u64>,
    /// Let the guest report free pages by itself; on if reporting= is given
    #[arg(long, value_parser = on_off())]
    pub free_page_reporting: Option<bool>,
    /// When the host gets reported pages; lazy by default
    #[arg(long, value_parser = reporting())]
    pub reporting: Option<Release>,
}

impl Keys for BalloonSpec {
    fn settle(mut self, _given: &[String]) -> Result<Self, ConfigError> {
        match (self.free_page_reporting, self.reporting) {
            (Some(false), Some(_)) => return Err(ConfigError::ReportingOff),
            (Some(true), None) => self.reporting = Some(Release::MarkFree),
            _ => {}
        }
        if !self.auto && self.reserve.is_some() {
            return Err(ConfigError::ReserveAlone);
        }
        if self.auto && self.statistics == Some(0) {
            return Err(ConfigError::AutoWithoutStatistics);
        }
        Ok(self)
    }
}

/// How pages that the guest reports free go back to the host. After the acknowledgement the guest may write to them at
/// any time, so from then on they must not be discarded.
fn reporting() -> impl TypedValueParser<Value = Release> {
    PossibleValuesParser::new([
        PossibleValue::new("eager").help("at once, before the report is acknowledged"),
        PossibleValue::new("lazy")
            .help("when it is short of memory, unless the guest writes to them first"),
    ])
    .map(|name| match name.as_str() {
        "eager" => Release::Discard,
        _ => Release::MarkFree,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys::{assert_refused, parse_keys};

    #[test]
    fn the_balloon_reports_when_asked_to() {
        let balloon: BalloonSpec =
            parse_keys("size=1G,deflate_on_oom=on,statistics=5,reporting=eager").unwrap();
        let expected = BalloonSpec {
            size: 1 << 30,
            deflate_on_oom: Some(true),
            statistics: Some(5),
            auto: false,
            reserve: None,
            free_page_reporting: None,
            reporting: Some(Release::Discard),
        };
        assert_eq!(balloon, expected);
        for (text, reporting) in [
            ("size=0", None),
            ("free_page_reporting=on", Some(Release::MarkFree)),
            ("free_page_reporting=off", None),
            (
                "free_page_reporting=on,reporting=eager",
                Some(Release::Discard),
            ),
            ("reporting=lazy", Some(Release::MarkFree)),
        ] {
            let balloon: BalloonSpec = parse_keys(text).unwrap();
            assert_eq!(balloon.reporting, reporting, "{text}");
        }
    }

    #[test]
    fn wrong_choices_say_what_is_right() {
        assert_refused::<BalloonSpec>(&[
            (
                "size=6K",
                "size=6K: not a multiple of 4K; the nearest below is 4K",
            ),
            ("statistics=65536", "at most 65535"),
            ("reporting=on", "reporting=on: write eager or lazy"),
            (
                "free_page_reporting=off,reporting=lazy",
                "free_page_reporting=off,reporting: remove one of them",
            ),
            (
                "reserve=1G",
                "--balloon reserve: only a balloon that runs itself keeps one; add auto=on or remove reserve",
            ),
            (
                "auto=on,statistics=0",
                "--balloon auto=on,statistics=0: it goes by the guest's statistics; remove statistics=0",
            ),
            ("auto=maybe", "auto=maybe: write on or off"),
        ]);
    }
}
