//! WebHDFS: the file system over HTTP, as HDFS's public REST description has it.
//!
//! # Overview
//! Operations on names are calls of the core, with the rights of `user.name`, as the gRPC service makes them. Those on bytes (`OPEN`, `CREATE`,
//! `APPEND`, `GETFILECHECKSUM`) are answered with the address of a datanode that does it ([`redirect`]). [`get`] holds the operations that only
//! ask, [`change`] the others, [`json`] and [`locations`] the shapes of answers.
//!
//! What the file system does not have (ACLs, extended attributes, snapshots, quotas, storage policies, erasure coding, symbolic links, tokens)
//! is answered truthfully where the question has an answer, and else with `UnsupportedOperationException`.
//!
//! # Cancellation
//! A client that goes away leaves open whether its change was made; changes of names are whole or not there.

mod change;
mod get;
mod json;
mod locations;
mod redirect;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use cairn_common::net::http::{self, Answer, Incoming, Method, Request, StatusCode};
use cairn_proto::path;
use cairn_proto::webhdfs::{self, Parameters};
use cairn_proto::{Error, ErrorCode, Result};

use super::State;
use crate::core::{Caller, ClientRequest, ClientResponse};

pub use redirect::Nodes;

/// What a client may send along with an operation on names; nobody looks at it.
const BODY_BYTES: u64 = 16 << 20;

/// Operations of the REST description that this file system has nothing for.
const UNSUPPORTED: &[(&str, &[&str])] = &[
    (
        "GET",
        &[
            "GETALLSTORAGEPOLICY",
            "GETDELEGATIONTOKENS",
            "GETECCODECS",
            "GETECPOLICIES",
            "GETECPOLICY",
            "GETLINKTARGET",
            "GETSNAPSHOTDIFF",
            "GETSNAPSHOTDIFFLISTING",
            "GETSNAPSHOTLIST",
            "GETSNAPSHOTTABLEDIRECTORYLIST",
            "GETSTORAGEPOLICY",
        ],
    ),
    (
        "PUT",
        &[
            "ALLOWSNAPSHOT",
            "CANCELDELEGATIONTOKEN",
            "CREATESNAPSHOT",
            "CREATESYMLINK",
            "DISABLEECPOLICY",
            "DISALLOWSNAPSHOT",
            "ENABLEECPOLICY",
            "MODIFYACLENTRIES",
            "REMOVEACL",
            "REMOVEACLENTRIES",
            "REMOVEDEFAULTACL",
            "REMOVEXATTR",
            "RENAMESNAPSHOT",
            "RENEWDELEGATIONTOKEN",
            "SATISFYSTORAGEPOLICY",
            "SETACL",
            "SETECPOLICY",
            "SETQUOTA",
            "SETQUOTABYSTORAGETYPE",
            "SETSTORAGEPOLICY",
            "SETXATTR",
        ],
    ),
    ("POST", &["UNSETECPOLICY", "UNSETSTORAGEPOLICY"]),
    ("DELETE", &["DELETESNAPSHOT"]),
];

/// One request.
struct Call<'a> {
    state: &'a State,
    caller: Caller,
    path: String,
    parameters: Parameters,
}

impl Call<'_> {
    /// Calls the core.
    async fn ask<Q, R>(&self, request: Q) -> Result<R>
    where
        ClientRequest: From<Q>,
        R: TryFrom<ClientResponse>,
    {
        self.state.owner.call(self.caller.clone(), request).await
    }
}

/// Answers a request for a path below `/webhdfs/v1`.
pub async fn answer(mut request: Request<Incoming>, peer: IpAddr, state: &State) -> Answer {
    let result = operate(&request, peer, state).await;
    // A client that waits for "100 Continue" sends nothing before it has its answer.
    if !request.headers().contains_key(http::header::EXPECT) {
        http::drain(request.body_mut(), &state.env.clock, BODY_BYTES).await;
    }
    result.unwrap_or_else(|error| http::refusal(&error))
}

async fn operate(request: &Request<Incoming>, peer: IpAddr, state: &State) -> Result<Answer> {
    let parameters = Parameters::parse(request.uri().query().unwrap_or_default())?;
    let path = webhdfs::path_of(request.uri().path())?;
    let op = parameters.op()?;
    let user = parameters.user(&state.proxy_users)?.to_owned();
    let groups = state.groups.of(&user).await;
    let caller = Caller { user, groups, host: peer.to_canonical().to_string() };
    let call = Call { state, caller, path, parameters };
    match *request.method() {
        Method::GET | Method::HEAD => call.get(&op).await,
        Method::PUT => call.put(&op).await,
        Method::POST => call.post(&op).await,
        Method::DELETE => call.delete(&op).await,
        _ => Err(webhdfs::invalid(format!("the method {} is none of GET, PUT, POST and DELETE", request.method()))),
    }
}

/// What is said about an operation that is not served with this method.
fn no_operation(method: &str, op: &str) -> Error {
    let known = |(of, ops): &&(&str, &[&str])| *of == method && ops.contains(&op);
    if UNSUPPORTED.iter().any(|group| known(&group)) {
        let text = format!("{op} is not supported: this file system has nothing of that kind");
        return Error::new(ErrorCode::Unsupported, text);
    }
    let shown: String = op.chars().take(60).collect();
    webhdfs::invalid(format!(
        "Invalid value for webhdfs parameter \"op\": {shown} is no operation of the method {method}"
    ))
}

/// A JSON answer with 200.
fn found(value: &serde_json::Value) -> Answer {
    http::json(StatusCode::OK, value.to_string())
}

/// 200 without a body: a change that has no result.
fn done() -> Answer {
    http::respond(StatusCode::OK, "application/octet-stream", "")
}

fn home_of(user: &str) -> String {
    path::join("/user", user)
}
