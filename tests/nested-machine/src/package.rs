//! Chooses the kernel package.

use ebb_pod_image::kernel::compare;

/// The series that guests boot, and the one that they start by kexec.
const SERIES: [&str; 2] = ["6.12.", "6.1."];

/// The newest `linux-image-VERSION-cloud-amd64` of these series among package names, without unsigned kernels and debug symbols.
pub fn newest_kernel<'a>(names: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let newest = names
        .into_iter()
        .filter_map(|name| Some((release(name)?, name)))
        .max_by(|(a, _), (b, _)| compare(a, b));
    newest.map(|(_, name)| name)
}

/// The kernel release of a package name, such as `6.12.117+deb12-cloud-amd64`.
pub fn release(package: &str) -> Option<&str> {
    let release = package.strip_prefix("linux-image-")?;
    let version = release.strip_suffix("-cloud-amd64")?;
    let known = SERIES.iter().any(|series| version.starts_with(series));
    (known && !version.contains("unsigned")).then_some(release)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_signed_cloud_kernel_is_chosen() {
        let names = [
            "linux-image-6.12-cloud-amd64",
            "linux-image-6.12.9+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.101+deb12-cloud-amd64",
            "linux-image-6.12.118+deb12-amd64",
            "linux-image-6.12.118+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.118+deb12-cloud-amd64-dbg",
            "linux-image-6.12.118+deb12-rt-amd64",
            "linux-image-6.13.1+deb12-cloud-amd64",
            "linux-image-6.12.118+deb12-cloud-arm64",
        ];
        assert_eq!(
            newest_kernel(names),
            Some("linux-image-6.12.117+deb12-cloud-amd64")
        );
    }

    #[test]
    fn nothing_is_chosen_from_nothing() {
        assert_eq!(newest_kernel(["linux-image-amd64", ""]), None);
    }

    #[test]
    fn the_release_is_the_name_without_its_prefix() {
        let name = "linux-image-6.12.117+deb12-cloud-amd64";
        assert_eq!(release(name), Some("6.12.117+deb12-cloud-amd64"));
    }
}
