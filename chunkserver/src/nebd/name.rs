//! Names of files: `<type>:<anything>`, and what the type `cbd` says (nebd-behaviour §B3).

/// A `cbd` name, taken apart: `cbd:<pool>/<path>_<user>_[:<configuration file>]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CurveName<'a> {
    /// Path of the volume, usually with a leading `/`.
    pub path: &'a str,
    /// Its owner.
    pub user: &'a str,
    /// Client configuration of the cluster it is in; empty: the default one.
    pub conf: &'a str,
}

/// Why a name is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not `cbd:`.
    #[error("its type is not cbd")]
    Type,
    /// Not `cbd:<pool>/<path>_<user>_`.
    #[error("it is not cbd:POOL/PATH_USER_[:CONF]")]
    Form,
}

impl<'a> CurveName<'a> {
    /// Take a complete name apart, as the originals do.
    ///
    /// # Errors
    /// [`NameError`].
    pub fn parse(name: &'a str) -> Result<Self, NameError> {
        if name.split_once(':').is_none_or(|(kind, _)| kind != "cbd") {
            return Err(NameError::Type);
        }
        let slash = name.find('/').ok_or(NameError::Form)?;
        let colon = name.rfind(':').ok_or(NameError::Form)?;
        // The last colon is the first one's: there is no configuration.
        let (end, conf) = if colon < slash { (name.len(), "") } else { (colon, name.get(colon + 1..).unwrap_or("")) };
        let curve = name.get(slash + 1..end).ok_or(NameError::Form)?;
        if curve.len() <= 2 {
            return Err(NameError::Form);
        }
        let (head, _) = curve.rsplit_once('_').ok_or(NameError::Form)?;
        let (path, user) = head.rsplit_once('_').ok_or(NameError::Form)?;
        Ok(Self { path, user, conf })
    }

    /// Name of the volume in a local catalog, which knows neither folders nor owners: the path without its leading `/`,
    /// `+` for every other one.
    #[must_use]
    pub fn local(&self) -> String {
        self.path.trim_start_matches('/').replace('/', "+")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_of_the_contract() {
        for (name, path, user, conf, local) in [
            ("cbd:pool1//cinder/volume-6f30_cinder_", "/cinder/volume-6f30", "cinder", "", "cinder+volume-6f30"),
            ("cbd:p//a_u_:/etc/curve/client.conf", "/a", "u", "/etc/curve/client.conf", "a"),
            ("cbd:p//a_u_:", "/a", "u", "", "a"),
            ("cbd:p/a_u_", "a", "u", "", "a"),
            ("cbd:/a_u_", "a", "u", "", "a"),
            ("cbd:p//a_b_u_rest", "/a_b", "u", "", "a_b"),
            ("cbd:p//a:b_u_", "/a:b_u_", "", "", ""),
        ] {
            if path == "/a:b_u_" {
                assert_eq!(CurveName::parse(name), Err(NameError::Form), "the last colon ends the name");
                continue;
            }
            let parsed = CurveName::parse(name).unwrap();
            assert_eq!((parsed.path, parsed.user, parsed.conf, parsed.local()), (path, user, conf, local.to_owned()));
        }
    }

    #[test]
    fn what_is_refused() {
        for name in ["", "cbd", "test:/a_u_", "Cbd:p/a_u_", ":p/a_u_", "cbdx:p/a_u_"] {
            assert_eq!(CurveName::parse(name), Err(NameError::Type), "{name}");
        }
        for name in ["cbd:", "cbd:a_u_", "cbd:p/", "cbd:p/__", "cbd:p/a_u", "cbd:p/abc", "cbd:p/:/conf"] {
            assert_eq!(CurveName::parse(name), Err(NameError::Form), "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(name in "(cbd:)?[a:/_é]{0,20}") {
            let _ = CurveName::parse(&name).map(|n| n.local());
        }
    }
}
