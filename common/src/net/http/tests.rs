use super::*;
use crate::net::Net;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Sends `request` as it is to a server that answers with the length of the body, and returns all that comes back.
async fn exchange(request: &[u8]) -> String {
    let net = Net::tcp();
    let listener = net.bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().to_string();
    let clock = Clock::system();
    let handler = {
        let clock = clock.clone();
        move |mut request: Request<Incoming>, _peer| {
            let clock = clock.clone();
            async move {
                let mut length = 0;
                let mut pieces = Pieces::new(request.body_mut(), &clock);
                loop {
                    match pieces.next().await {
                        Ok(Some(piece)) => length += piece.len(),
                        Ok(None) => return text(StatusCode::OK, format!("{length} bytes")),
                        Err(error) => return text(StatusCode::BAD_REQUEST, error.to_string()),
                    }
                }
            }
        }
    };
    let (stop, mut stopped) = watch::channel(false);
    let server = tokio::spawn(async move {
        let stop = async move { stopped.wait_for(|&stop| stop).await.map(|_| ()) };
        serve(listener, clock, 2, std::future::pending::<()>(), stop, handler).await;
    });
    let mut conn = net.connect(&addr, Duration::from_secs(5)).await.unwrap();
    conn.write_all(request).await.unwrap();
    let mut got = Vec::new();
    conn.read_to_end(&mut got).await.unwrap();
    stop.send_replace(true);
    server.await.unwrap();
    String::from_utf8(got).unwrap()
}

#[tokio::test]
async fn bodies_come_with_a_length_or_in_chunks() {
    let head = "PUT /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n";
    let got = exchange(format!("{head}Content-Length: 5\r\n\r\nhello").as_bytes()).await;
    assert!(got.starts_with("HTTP/1.1 200 OK\r\n") && got.ends_with("\r\n\r\n5 bytes"), "{got}");
    let chunked = "Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n8\r\n12345678\r\n0\r\n\r\n";
    let got = exchange(format!("{head}{chunked}").as_bytes()).await;
    assert!(got.ends_with("11 bytes"), "{got}");
}

#[tokio::test]
async fn heads_without_end_are_refused() {
    let head = format!("GET /x HTTP/1.1\r\nHost: h\r\nX-Big: {}\r\n\r\n", "x".repeat(400 << 10));
    let got = exchange(head.as_bytes()).await;
    assert!(got.starts_with("HTTP/1.1 431 "), "{got}");
    let got = exchange(b"\x16\x03\x01 no HTTP at all\r\n\r\n").await;
    assert!(got.starts_with("HTTP/1.1 400 "), "{got}");
}

/// A body of `bytes` every `pause`.
fn trickle(bytes: usize, pause: Duration) -> impl hyper::body::Body<Data = Bytes, Error = Infallible> + Unpin {
    StreamBody::new(Box::pin(futures_util::stream::unfold((), move |()| async move {
        tokio::time::sleep(pause).await;
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from(vec![0; bytes]))), ()))
    })))
}

#[tokio::test(start_paused = true)]
async fn a_body_that_hardly_moves_is_given_up() {
    let clock = Clock::system();
    let mut body = trickle(1, Duration::from_secs(25));
    let mut pieces = Pieces::new(&mut body, &clock);
    for _ in 0..2 {
        assert_eq!(pieces.next().await.unwrap().unwrap().len(), 1);
        // What the receiver takes for itself is not the client's fault.
        tokio::time::sleep(10 * STALL).await;
    }
    let error = pieces.next().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::TimedOut);
    assert!(error.message().contains("2 bytes of data came in 60s"), "{error}");
    // Slow, but it moves.
    let mut body = trickle(STALL_BYTES / 2, Duration::from_secs(29));
    let mut pieces = Pieces::new(&mut body, &clock);
    for _ in 0..100 {
        pieces.next().await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_closed_door_takes_nobody_in_and_serves_those_inside() {
    let net = Net::tcp();
    let listener = net.bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().to_string();
    let (close, closed) = watch::channel(0);
    let reaches = |stage: u32| {
        let mut closed = closed.clone();
        async move { closed.wait_for(|&now| now >= stage).await.map(|_| ()) }
    };
    let handler = |_: Request<Incoming>, _| async { text(StatusCode::OK, "served") };
    let server = tokio::spawn(serve(listener, Clock::system(), 9, reaches(1), reaches(2), handler));
    let mut inside = net.connect(&addr, Duration::from_secs(5)).await.unwrap();
    let mut ask = async || {
        inside.write_all(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n").await.unwrap();
        let mut got = vec![0; 4_096];
        let count = inside.read(&mut got).await.unwrap();
        String::from_utf8_lossy(&got[..count]).into_owned()
    };
    assert!(ask().await.ends_with("served"));
    close.send_replace(1);
    while net.connect(&addr, Duration::from_secs(5)).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(ask().await.ends_with("served"));
    close.send_replace(2);
    server.await.unwrap();
    assert_eq!(inside.read(&mut [0; 8]).await.unwrap_or(0), 0);
}
