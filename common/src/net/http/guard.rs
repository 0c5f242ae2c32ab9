//! Which requests come from a web page.
//!
//! A page that somebody has open may send requests to every address that its browser reaches, loopback included. Such a request has an
//! `Origin` header, or says that it is of another site. A page may also give an address of ours a name of its own (DNS rebinding); then
//! `Host` holds that name.

use std::net::IpAddr;
use std::sync::Arc;

use cairn_proto::{Error, ErrorCode, Result};
use hyper::{HeaderMap, Uri, header};

/// Lets programs in and keeps web pages out.
#[derive(Clone, Debug)]
pub struct Guard {
    /// In lower case.
    names: Arc<[String]>,
    /// The setting that takes more names.
    setting: &'static str,
}

fn refused(text: String) -> Error {
    Error::new(ErrorCode::PermissionDenied, text)
}

/// Without its port, in lower case.
fn host_of(authority: &str) -> String {
    let host = match authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => authority.rsplit_once(':').map_or(authority, |(host, _)| host),
    };
    host.trim_end_matches('.').to_ascii_lowercase()
}

impl Guard {
    /// A guard that accepts IP addresses, `localhost` and these names as `Host`; its refusals point to `setting`.
    pub fn new(names: impl IntoIterator<Item = String>, setting: &'static str) -> Self {
        let names = names.into_iter().map(|name| name.to_ascii_lowercase()).chain(["localhost".into()]);
        Self { names: names.collect(), setting }
    }

    /// Refuses a request of a web page.
    pub fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<()> {
        if headers.contains_key(header::ORIGIN) {
            return Err(refused("requests of web pages (with an Origin header) are refused".into()));
        }
        let site = headers.get("sec-fetch-site").map(header::HeaderValue::as_bytes);
        if site.is_some_and(|site| site != b"none" && site != b"same-origin") {
            return Err(refused("requests of web pages of other sites are refused".into()));
        }
        let named = headers.get(header::HOST).map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned());
        for authority in named.into_iter().chain(uri.authority().map(|authority| authority.as_str().to_owned())) {
            let host = host_of(&authority);
            if !self.knows(&host) {
                let (host, setting) = (host.chars().take(100).collect::<String>(), self.setting);
                return Err(refused(format!(
                    "the host {host:?} is not this machine's: call it by its address, or add the name to {setting}"
                )));
            }
        }
        Ok(())
    }

    fn knows(&self, host: &str) -> bool {
        host.parse::<IpAddr>().is_ok() || self.names.iter().any(|name| name == host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pairs: &[(&'static str, &str)]) -> Result<()> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, value.parse().unwrap());
        }
        Guard::new(["NN1".to_owned()], "namenode.http_names").check(&Uri::from_static("/x"), &headers)
    }

    #[test]
    fn programs_come_in_by_address_and_known_names() {
        for host in ["127.0.0.1:9870", "10.0.0.1", "[::1]:9870", "localhost:1", "nn1:9870", "Nn1", "localhost."] {
            assert!(check(&[("host", host)]).is_ok(), "{host}");
        }
        assert!(check(&[]).is_ok(), "HTTP/1.0 has no Host");
        assert!(check(&[("sec-fetch-site", "none")]).is_ok(), "somebody typed the address");
    }

    #[test]
    fn pages_stay_out() {
        assert!(check(&[("origin", "http://127.0.0.1:9870")]).is_err());
        assert!(check(&[("sec-fetch-site", "cross-site")]).is_err());
        for host in ["evil.example:9870", "127.0.0.1.evil.example", "", "nn1.evil.example"] {
            let error = check(&[("host", host)]).unwrap_err();
            assert!(error.message().contains("namenode.http_names"), "{host}: {error}");
        }
        let absolute = Uri::from_static("http://evil.example/x");
        assert!(Guard::new([], "s").check(&absolute, &HeaderMap::new()).is_err());
    }
}
