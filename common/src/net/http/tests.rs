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
                loop {
                    match next_piece(request.body_mut(), &clock).await {
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
        serve(listener, clock, 2, async move { stopped.wait_for(|&stop| stop).await.map(|_| ()) }, handler).await;
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

#[tokio::test(start_paused = true)]
async fn a_body_that_stands_still_is_given_up() {
    let clock = Clock::system();
    let pieces = futures_util::stream::unfold(0, |at| async move {
        // Slow, but it moves; the third never comes.
        tokio::time::sleep(if at < 2 { STALL - Duration::from_secs(1) } else { 10 * STALL }).await;
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"x"))), at + 1))
    });
    let mut body = StreamBody::new(Box::pin(pieces));
    for _ in 0..2 {
        assert_eq!(next_piece(&mut body, &clock).await.unwrap().unwrap(), "x");
    }
    assert_eq!(next_piece(&mut body, &clock).await.unwrap_err().code(), ErrorCode::TimedOut);
}
