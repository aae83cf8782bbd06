//! Who is at the other end of the socket, and whether they may speak.

use std::ffi::CString;
use std::sync::Arc;

use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use nix::unistd::{Gid, Group, Uid, User, getgrouplist};
use policy::review::Who;
use tokio::net::UnixListener;

use super::routes::Problem;
use super::view::{Failure, FailureCode};
use crate::cli::client::CLAIM;

/// The group whose members may use the command line.
const GROUP: &str = "bulkhead";

/// The peer of one connection, as the kernel says (SO_PEERCRED, unix(7)).
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer {
    /// Uid and gid when it connected; `None`: the kernel would not say.
    credentials: Option<(u32, u32)>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self { credentials: stream.io().peer_cred().ok().map(|cred| (cred.uid(), cred.gid())) }
    }
}

/// Who may speak.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Open>);

#[derive(Debug)]
struct Open {
    /// Its user may speak.
    own: Option<Uid>,
    group: Option<Gid>,
}

impl Gate {
    /// Root, and the group `bulkhead` where there is one. `own`: and this process's user, who started it for themselves. Whom `up` put
    /// it under may be `nobody`, and much else on a host runs as that.
    pub fn new(own: bool) -> Self {
        let group = Group::from_name(GROUP).ok().flatten().map(|group| group.gid);
        Self(Arc::new(Open { own: own.then(Uid::effective), group }))
    }

    /// The group's id.
    pub(super) fn group(&self) -> Option<u32> {
        self.0.group.map(Gid::as_raw)
    }

    fn lets(&self, uid: u32, gid: u32) -> bool {
        let uid = Uid::from_raw(uid);
        if uid.is_root() || self.0.own == Some(uid) {
            return true;
        }
        let Some(group) = self.0.group else { return false };
        if Gid::from_raw(gid) == group {
            return true;
        }
        // By the user database, since SO_PEERCRED carries no supplementary groups.
        let Ok(Some(user)) = User::from_uid(uid) else { return false };
        let Ok(name) = CString::new(user.name) else { return false };
        getgrouplist(&name, user.gid).is_ok_and(|groups| groups.contains(&group))
    }
}

/// The name of a uid, or the number where it has none.
pub(crate) fn name_of(uid: u32) -> String {
    User::from_uid(Uid::from_raw(uid)).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}

/// Refuses everybody who may not speak, before anything else is looked at.
pub(super) async fn check(State(gate): State<Gate>, ConnectInfo(peer): ConnectInfo<Peer>, request: Request, next: Next) -> Response {
    match peer.credentials {
        Some((uid, gid)) if gate.lets(uid, gid) => next.run(request).await,
        credentials => {
            let who = credentials
                .map_or_else(|| "somebody the kernel does not name".to_owned(), |(uid, _)| format!("{} (uid {uid})", name_of(uid)));
            tracing::warn!(%who, "refused at the socket");
            Problem(Failure {
                error: format!("{who} may not speak to the controller"),
                code: FailureCode::Forbidden,
                next: "Use sudo, or become a member of the group bulkhead (and log in again).".to_owned(),
            })
            .into_response()
        }
    }
}

/// Who asks, for the record.
pub(super) struct Asking(pub(super) Who);

impl<S: Send + Sync> FromRequestParts<S> for Asking {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let nobody = || {
            Problem(Failure {
                error: "the kernel does not say who is asking".to_owned(),
                code: FailureCode::Forbidden,
                next: String::new(),
            })
        };
        let ConnectInfo(peer) = ConnectInfo::<Peer>::from_request_parts(parts, state).await.map_err(|_| nobody())?;
        let (uid, _) = peer.credentials.ok_or_else(nobody)?;
        let claim = parts.headers.get(CLAIM).and_then(|claim| claim.to_str().ok());
        // A claim is shown beside the truth, so it is kept short and plain.
        let claims =
            claim.filter(|claim| !claim.is_empty() && claim.len() <= 64 && claim.bytes().all(|b| b.is_ascii_graphic())).map(str::to_owned);
        Ok(Self(Who { uid, name: name_of(uid), claims }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_controllers_own_user_may_speak_where_it_is_a_persons_and_not_where_up_chose_it() {
        let (user, others) = (Uid::from_raw(65_534), 65_534);
        for (own, lets) in [(Some(user), true), (None, false)] {
            let gate = Gate(Arc::new(Open { own, group: None }));
            assert_eq!(gate.lets(user.as_raw(), others), lets, "own user: {own:?}");
            assert!(gate.lets(0, 0), "root may, own user: {own:?}");
        }
        let gate = Gate(Arc::new(Open { own: None, group: Some(Gid::from_raw(64_000)) }));
        assert!(gate.lets(user.as_raw(), 64_000), "the group may, whoever of it asks");
    }
}
